"""WikiText-103, word by word, at the sizes of the paper's released code.

Mixtures have their presets' experts (of DeepSeek's that code has four of F/4 and one shared one,
and a token chooses one).

Command:   uoe compare --config=compare/lm_wikitext103 --workdir=runs/lm_wikitext103
           --config.base.data.path=DIR says where the archive is (see configs/wikitext103.py)
Hardware:  accelerators.
Time:      not run.
Expected:  not run.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

ROWS = ("full_attention", "xmoe", "deepseek_moe", "skywork_moe", "deepseek_v3", "uoe")


def get_config(variant: str = ""):
    c = experiment("wikitext103", variant)
    return recipes.compared(
        table(c, ROWS, title="WikiText-103", lengths=recipes.LENGTHS), variant, ROWS
    )
