"""Long Range Arena, Pathfinder: whether a dashed path joins two dots, pixel by pixel.

Command:   uoe train --config=lra_pathfinder --config.data.path=DIR --workdir=runs/lra_pathfinder
           DIR is the lra_release directory of the benchmark's archive (with
           pathfinder32/curv_contour_length_14). Without data.path, such images are generated.
Hardware:  meant for one GPU; any will do.
Time:      not measured.
Expected:  not measured. Sizes and schedule are those of the released code.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.long_range_arena(c)
    c.data.source = "pathfinder"
    c.model.context_length = 1024  # every grey value is a token
    c.model.classifier.n_classes = 2
    c.optimizer.warmup_steps = 8_000
    c.optimizer.weight_decay = 0.0
    c.model.dropout = 0.1
    c.train.steps = 150_000
    c.train.batch_size = 256
    c.eval.every = c.checkpoint.every = 3_000
    return recipes.finished(c, variant)
