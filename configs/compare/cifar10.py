"""CIFAR-10 by a small vision transformer.

Command:   uoe compare --config=compare/cifar10 --workdir=runs/cifar10
           --config.base.data.path=DATA_DIR says where TensorFlow Datasets keeps its data
Hardware:  accelerators.
Time:      not run.
Expected:  not run.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

ROWS = (
    "full_attention",
    "switch",
    "expert_choice",
    "xmoe",
    "deepseek_moe",
    "skywork_moe",
    "deepseek_v3",
    "uoe",
)


def get_config(variant: str = ""):
    c = experiment("cifar10", variant)
    return recipes.compared(table(c, ROWS, title="CIFAR-10"), variant, ROWS)
