"""Long Range Arena as in the paper's released code: mixtures, efficient attention, UoE.

Command:   uoe compare --config=compare/lra --workdir=runs/lra
           --config=compare/lra:text, :retrieval, :image, :pathfinder, with
           --config.base.data.path=DIR as in configs/lra_*.py
Hardware:  accelerators.
Time:      not run.
Expected:  not run.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

MIXTURES = (
    "full_attention",
    "expert_choice",
    "xmoe",
    "deepseek_moe",
    "skywork_moe",
    "deepseek_v3",
    "uoe",
)
EFFICIENT = ("linformer", "nystromformer", "performer", "reformer", "long_short")
TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


def get_config(variant: str = "listops"):
    task = "listops" if variant == "tiny" else variant
    if task not in TASKS:
        raise ValueError(
            f"there is no variant {variant!r}; give {', '.join(map(repr, TASKS))} or 'tiny'"
        )
    c = experiment(f"lra_{task}", variant)
    # As in the authors' harness: LSH in chunks of 64 in two rounds, a window of 8, 32 projections.
    c.model.linformer.rank, c.model.nystromformer.landmarks = 256, 128
    c.model.performer.features = 256
    c.model.reformer.chunk, c.model.long_short.window, c.model.long_short.rank = 64, 8, 32
    if variant == "tiny":
        c.model.linformer.rank, c.model.nystromformer.landmarks = 8, 8
        c.model.performer.features = 8
        c.model.reformer.chunk = c.model.long_short.rank = 8
    made = table(
        c, (*MIXTURES, *EFFICIENT), title=f"Long Range Arena, {task}", lengths=recipes.LENGTHS
    )
    return recipes.compared(made, "tiny" if variant == "tiny" else "", MIXTURES)
