"""A run of seconds: the quickstart's blocks at toy size. `--config=tests/tiny.py`; the source is given by --config.data.path."""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.model.d_model = 32
    c.model.n_layers = 2
    c.model.n_heads = 4
    c.model.d_hidden = 64
    c.model.context_length = 64
    for block in (c.model.smha, c.model.uome):
        block.n_experts = 4
        block.k = 2
        block.capacity_window = 16
    c.train.steps = 20
    c.train.batch_size = 8
    c.train.log_every = 1
    c.train.report = False  # it takes seconds
    c.eval.every = 7
    c.eval.batches = 2
    c.checkpoint.every = 5
    c.generate.max_tokens = 8
    c.optimizer.warmup_steps = 5
    c.optimizer.learning_rate = 1e-2
    if variant == "accumulate":
        c.train.accumulation = 4
    return c
