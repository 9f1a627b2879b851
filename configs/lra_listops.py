"""Long Range Arena, ListOps: the value of a nested expression, generated without any files.

Command:   uoe train --config=lra_listops --workdir=runs/lra_listops
           uoe train --config=lra_listops:short --workdir=runs/listops
           `:short` has expressions of at most 128 tokens, for a laptop.
Hardware:  meant for one GPU; `:short` for 2 CPU cores.
Time:      not measured; `:short` 9.0, 9.5 and 11.3 minutes in all, beside other work on the same
           two cores (2026-11-25, Python 3.11.7, jax 0.10.2).
Expected:  not measured; `:short` 50.25, 49.90 and 50.05 % of the test split with train.seed 0, 1
           and 2. To compare: 32.65 % is the best that the root's operator and its number of
           arguments tell (`python -m benchmarks.listops_baseline --min-length=10
           --max-length=129`), 15.5 % the commonest value; the dense model of the same sizes
           (`:short-dense`) 52.30, 51.25 and 54.05 % with the same seeds.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.long_range_arena(c)
    c.data.source = "listops"
    c.model.context_length = 2048
    c.model.classifier.n_classes = 10
    c.optimizer.warmup_steps = 1_000
    c.optimizer.weight_decay = 0.0
    c.train.steps = 15_000
    c.train.batch_size = 32
    c.eval.every = c.checkpoint.every = 500
    if variant in ("short", "short-dense"):
        c.data.listops.update(min_length=10, max_length=129)
        c.model.context_length = 128
        c.data.buckets = 4
        c.model.n_layers, c.model.d_model, c.model.n_heads, c.model.d_hidden = 3, 64, 4, 128
        c.model.smha.n_experts, c.model.smha.k = 4, 3
        c.optimizer.learning_rate = 2e-3
        c.optimizer.warmup_steps = 200
        c.train.steps = 2_000
        c.train.batch_size = 64
        if variant == "short-dense":  # the same sizes without routing, to compare with
            c.model.attention = c.model.mlp = "dense"
    return recipes.finished(c, variant, "short", "short-dense")
