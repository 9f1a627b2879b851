"""A language model of bytes on the Python standard library: mixtures of experts, full attention, and UoE with its ablations.

Command:   uoe compare --config=compare/lm_stdlib --workdir=runs/lm_stdlib
           uoe compare --config=compare/lm_stdlib:short --workdir=runs/lm_stdlib   one seed of fewer rows and steps
Hardware:  2 CPU cores.
Time:      not measured.
Expected:  not measured.
"""

from uoe_jax import recipes
from uoe_jax.compare.table import experiment, table

PEERS = ("full_attention", "gshard", "deepseek_moe", "deepseek_v3", "skywork_moe", "xmoe", "moh", "uoe")
GATES = ("gate_normalized", "gate_score", "gate_straight_through", "gate_none")  # the base's own is sigmoid
CAPACITIES = ("capacity_0.75", "capacity_1.0", "capacity_2.0")
BALANCE = ("no_balance", "switch_balance", "bias_balance")


def get_config(variant: str = ""):
    c = experiment("quickstart:tiny" if variant == "tiny" else "quickstart")
    rows = (*PEERS, "smha_only", "uome_only", *GATES, *CAPACITIES, *BALANCE)
    if variant != "tiny":
        c.model.d_model, c.model.d_hidden = 128, 512
        c.train.steps, c.eval.every = 300, 100
        c.checkpoint.every = 0
    title = "Language models on the Python standard library, bytes"
    return recipes.compared(table(c, rows, title=title, lengths="64,128,256,512,1024,2048"), variant, PEERS)
