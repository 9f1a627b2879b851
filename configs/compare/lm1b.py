"""One Billion Word, word by word, at the sizes of the paper's released code.

Mixtures have their presets' experts (of DeepSeek's that code has four of F/4 and one shared one,
and a token chooses one).

Command:   uoe compare --config=compare/lm1b --workdir=runs/lm1b
           --config.base.data.path=DATA_DIR says where TensorFlow Datasets keeps its data
Hardware:  accelerators.
Time:      not run.
Expected:  not run.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

ROWS = ("full_attention", "xmoe", "deepseek_moe", "skywork_moe", "deepseek_v3", "uoe")


def get_config(variant: str = ""):
    c = experiment("lm1b", variant)
    return recipes.compared(
        table(c, ROWS, title="One Billion Word", lengths=recipes.LENGTHS), variant, ROWS
    )
