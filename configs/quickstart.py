from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.model.smha.capacity_factor = 1.5
    c.model.uome.capacity_factor = 1.25
    c.train.steps = 700
    c.train.batch_size = 8
    c.eval.batch_size = 16
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.warmup_steps = 50
    c.checkpoint.every = 250
    c.eval.every = 250
    c.eval.batches = 24
    if variant == "dense":
        c.model.attention = "dense"
        c.model.mlp = "dense"
    return c
