"""Long Range Arena, Image: CIFAR-10 in grey, one pixel after the other.

Command:   uoe train --config=lra_image --config.data.path=DATA_DIR --workdir=runs/lra_image
           DATA_DIR: where TensorFlow Datasets prepared cifar10 (uoe says how).
Hardware:  meant for one GPU; any will do.
Time:      not measured.
Expected:  not measured. Sizes and schedule are those of the released code.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.long_range_arena(c)
    c.data.source = "cifar10"
    c.model.context_length = 1024  # every grey value is a token
    c.model.classifier.n_classes = 10
    c.optimizer.warmup_steps = 8_000
    c.optimizer.weight_decay = 0.0
    c.model.dropout = 0.1
    c.train.steps = 30_000
    c.train.batch_size = 256
    c.eval.every = c.checkpoint.every = 1_000
    return recipes.finished(c, variant)
