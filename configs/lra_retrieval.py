"""Long Range Arena, Retrieval: whether two papers of the ACL Anthology Network cite each other.

Command:   uoe train --config=lra_retrieval --config.data.path=DIR --workdir=runs/lra_retrieval
           DIR is the lra_release directory of the benchmark's archive.
Hardware:  meant for one GPU; any will do.
Time:      not measured.
Expected:  not measured. Sizes and schedule are those of the released code.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.long_range_arena(c)
    c.data.source = "aan"
    c.data.buckets = 4
    c.model.context_length = 4096
    c.model.classifier.n_classes = 2
    c.model.classifier.n_inputs = 2
    c.model.classifier.d_head = 128
    c.optimizer.warmup_steps = 8_000
    c.optimizer.weight_decay = 0.01
    c.model.dropout = 0.1
    c.train.steps = 150_000
    c.train.batch_size = 8
    c.eval.every = c.checkpoint.every = 3_000
    return recipes.finished(c, variant)
