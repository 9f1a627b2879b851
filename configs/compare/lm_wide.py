"""Bytes of the Python standard library, wider, for one accelerator: D 512, six layers.

Command:   uoe compare --config=compare/lm_wide --workdir=runs/lm_wide
           --config.base.data.source=text --config.base.data.path=DIR
           trains on your own text.
           uoe compare --config=compare/lm_wide:cpu --workdir=runs/lm_wide_cpu
           `:cpu` has four layers, rows of 512 bytes, float32.
Hardware:  one GPU or TPU; `:cpu` 2 CPU cores.
Time:      not run to its end; 300 steps of four rows at once took 2.5 minutes on an H200
           (2026-11-26, Python 3.12.3, jax 0.11.2). `:cpu` 10 to 17 minutes for each of the 12 runs
           on one of two shared cores (2026-11-26, Python 3.11.7, jax 0.10.2).
Expected:  bits per byte of validation. `:cpu`, three seeds: UoE 2.368 +- 0.026, full attention
           2.392 +- 0.031, XMoE 2.399 +- 0.013, DeepSeek-V3 2.471 +- 0.024. On the H200, one seed,
           gate `sigmoid`: full attention 1.52, XMoE 1.71, DeepSeek-V3 1.72, both with drops; UoE
           (1.74 at step 200, where full attention had 1.79) was not seen to the end.
           docs/results.md has both.
"""

from uoe_jax.compare.table import experiment, table
from uoe_jax.config import recipes

ROWS = ("full_attention", "deepseek_v3", "xmoe", "uoe")


def get_config(variant: str = ""):
    c = experiment("quickstart", variant)
    if variant != "tiny":
        c.model.n_layers, c.model.d_model, c.model.d_hidden = 6, 512, 2048
        c.model.context_length, c.model.dtype = 1024, "bfloat16"
        c.train.steps, c.train.batch_size = 300, 32
        c.optimizer.learning_rate = 1e-3
        c.eval.every, c.eval.batch_size, c.eval.batches = 100, 32, 8
        c.checkpoint.every = 0
    made = table(c, ROWS, title="Wider language models on the Python standard library, bytes")
    if variant == "cpu":
        base = made.base
        base.model.n_layers, base.model.context_length, base.model.dtype = 4, 512, "float32"
        base.train.steps, base.train.batch_size = 600, 4
        base.eval.every, base.eval.batch_size = 150, 16
        return made
    return recipes.compared(made, variant, ROWS)
