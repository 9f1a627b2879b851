"""ListOps of at most 128 tokens: efficient attention, mixtures of experts, UoE and its ablations.

Command:   uoe compare --config=compare/listops --workdir=runs/listops
           uoe compare --config=compare/listops:short --workdir=runs/listops
           `:short` is one seed of fewer rows and steps.
Hardware:  2 CPU cores.
Time:      2 hours on one of two cores beside other work, and 10 minutes of measuring on both
           (2026-11-26, Python 3.11.7, jax 0.10.2); `:short` 8 minutes on one.
Expected:  UoE 41.3 % of test, full attention 43.5, UoME alone 42.6, SMHA alone 41.2, each +- 0.9 to
           1.7: docs/results.md.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

BASELINES = ("full_attention", "expert_choice", "deepseek_v3", "xmoe", "uoe")
ENCODERS = ("linformer", "nystromformer", "performer", "reformer", "long_short", "mosa")
ABLATIONS = ("smha_only", "uome_only", "hierarchical", "gate_none")


def get_config(variant: str = ""):
    c = experiment("lra_listops:short", variant)
    c.data.buckets = c.data.sort_window = 4
    if variant != "tiny":
        c.train.steps, c.eval.every = 500, 250
        c.checkpoint.every = 250
    c.model.linformer.rank = c.model.nystromformer.landmarks = 32
    title = "ListOps, expressions of at most 128 tokens"
    rows = (*BASELINES, *ENCODERS, *ABLATIONS)
    made = table(c, rows, title=title, learning_rates="0.001,0.003", lengths=recipes.LENGTHS)
    made.length_rows = ",".join((*BASELINES, *ENCODERS))
    return recipes.compared(made, variant, BASELINES)
