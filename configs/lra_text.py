"""Long Range Arena, Text: is a film review good or bad, read byte by byte.

Command:   uoe train --config=lra_text --config.data.path=DATA_DIR --workdir=runs/lra_text
           DATA_DIR: where TensorFlow Datasets prepared imdb_reviews (uoe says how).
Hardware:  meant for one GPU; any will do.
Time:      not measured.
Expected:  not measured. Sizes and schedule are those of the released code; a tenth of the training
           reviews is held out to choose the checkpoint, which that code did on the test reviews.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.long_range_arena(c)
    c.data.source = "imdb"
    c.data.buckets = 4
    c.model.context_length = 4096
    c.model.classifier.n_classes = 2
    c.optimizer.warmup_steps = 8_000
    c.optimizer.weight_decay = 0.01
    c.model.dropout = 0.1
    c.train.steps = 60_000
    c.train.batch_size = 16
    c.eval.every = c.checkpoint.every = 1_000
    return recipes.finished(c, variant)
