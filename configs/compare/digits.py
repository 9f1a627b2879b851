"""Handwritten digits: mixtures of experts, full attention, and UoE with its ablations.

Command:   uoe compare --config=compare/digits --workdir=runs/digits
           uoe compare --config=compare/digits:short --workdir=runs/digits
           `:short` is one seed of fewer rows and steps.
Hardware:  2 CPU cores.
Time:      54 minutes on one of two cores, beside other work (2026-11-26, Python 3.11.7, jax
           0.10.2); `:short` 4 minutes, likewise.
Expected:  all rows between 97.6 and 98.8 % of test, which is within the noise of 269 images:
           docs/results.md.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

BASELINES = (
    "full_attention",
    "switch",
    "expert_choice",
    "deepseek_moe",
    "deepseek_v3",
    "skywork_moe",
    "xmoe",
    "uoe",
)
ABLATIONS = (
    "smha_only",
    "uome_only",
    "hierarchical",
    "gate_normalized",
    "gate_score",
    "gate_straight_through",
    "gate_none",
)
CAPACITIES = ("capacity_0.75", "capacity_1.0", "capacity_2.0", "no_balance")


def get_config(variant: str = ""):
    c = experiment("digits", variant)
    if variant != "tiny":
        c.train.steps, c.eval.every = 800, 200
        c.checkpoint.every = 200
    title = "Handwritten digits of 8 x 8 pixels"
    rows = (*BASELINES, "mosa", "moh", *ABLATIONS, *CAPACITIES)
    return recipes.compared(
        table(c, rows, title=title, learning_rates="0.001,0.003"), variant, BASELINES
    )
