"""A language model of bytes on the Python standard library, as wide as fits a short stay on one accelerator: D 512, six layers.

Command:   uoe compare --config=compare/lm_wide --workdir=runs/lm_wide
           --config.base.data.source=text --config.base.data.path=DIR trains on text of your own instead
Hardware:  one GPU or TPU.
Time:      not run to its end; 300 steps of four rows at once took 2.5 minutes on an H200 (2026-11-26, Python 3.12.3, jax 0.11.2).
Expected:  bits per byte of validation, one seed: full attention 1.52, XMoE 1.71, DeepSeek-V3 1.72; UoE (1.74 at step 200, where full
           attention had 1.79) was not seen to the end: docs/results.md.
"""

from uoe_jax import recipes
from uoe_jax.compare.table import experiment, table

ROWS = ("full_attention", "deepseek_v3", "xmoe", "uoe")


def get_config(variant: str = ""):
    c = experiment("quickstart", variant)
    c.model.smha.gate = c.model.uome.gate = "sigmoid"  # as it was when this was run
    if variant != "tiny":
        c.model.n_layers, c.model.d_model, c.model.d_hidden, c.model.context_length = 6, 512, 2048, 1024
        c.model.dtype = "bfloat16"
        c.train.steps, c.train.batch_size = 300, 32
        c.optimizer.learning_rate = 1e-3
        c.eval.every, c.eval.batch_size, c.eval.batches = 100, 32, 8
        c.checkpoint.every = 0
    return recipes.compared(table(c, ROWS, title="Wider language models on the Python standard library, bytes"), variant, ROWS)
