"""Bytes of the Python standard library: mixtures of experts, full attention, UoE and ablations.

Command:   uoe compare --config=compare/lm_stdlib --workdir=runs/lm_stdlib
           uoe compare --config=compare/lm_stdlib:short --workdir=runs/lm_stdlib
           `:short` is one seed of fewer rows and steps.
           uoe compare --config=compare/lm_stdlib:flops --workdir=runs/lm_stdlib_flops
           `:flops` is matched by FLOPs.
Hardware:  2 CPU cores.
Time:      86 minutes on one of two cores beside other work, and 8 minutes of measuring on both
           (2026-11-26, Python 3.11.7, jax 0.10.2); `:short` 9 minutes on one of two cores, beside
           other work.
Expected:  bits per byte of validation: UoE 2.657, full attention 2.615, UoME alone 2.617, SMHA
           alone 2.692, each +- 0.01 to 0.05: docs/results.md.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

BASELINES = (
    "full_attention",
    "gshard",
    "deepseek_moe",
    "deepseek_v3",
    "skywork_moe",
    "xmoe",
    "moh",
    "uoe",
)
GATES = (
    "gate_normalized",
    "gate_score",
    "gate_straight_through",
    "gate_none",
)  # the base's own is sigmoid
CAPACITIES = ("capacity_0.75", "capacity_1.0", "capacity_2.0")
BALANCE = ("no_balance", "switch_balance", "bias_balance")

TITLE = "Language models on the Python standard library, bytes"
MORE = dict(learning_rates="0.001,0.003", lengths=recipes.LENGTHS, length_rows=",".join(BASELINES))


def get_config(variant: str = ""):
    c = experiment("quickstart", variant)
    c.model.smha.gate = c.model.uome.gate = "sigmoid"  # as it was when this was run
    rows = (*BASELINES, "smha_only", "uome_only", *GATES, *CAPACITIES, *BALANCE)
    if variant != "tiny":
        c.model.n_layers, c.model.d_model, c.model.d_hidden = 2, 128, 512
        c.train.steps, c.eval.every = 300, 100
        c.checkpoint.every = 0
    if (
        variant == "flops"
    ):  # as many operations as full attention, not its width; no row of other capacity
        made = table(c, BASELINES, title=f"{TITLE}, matched by operations", match="flops", **MORE)
        return recipes.compared(made, "", BASELINES)
    return recipes.compared(table(c, rows, title=TITLE, **MORE), variant, BASELINES)
