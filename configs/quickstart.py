"""A byte-level language model of 1.4M parameters on the Python standard library: SMHA attention, UoME MLP.

EXPECTED
"""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.model.n_layers = 3
    c.model.d_model = 192
    c.model.n_heads = 8
    c.model.d_hidden = 768
    c.model.context_length = 256

    # Attention: 4 experts of 2 heads. With K = 3 of 4 any two tokens share at least two experts, so that every token
    # can be seen from every later one; with 4 of 8 the model was 9 % worse than the dense one after 200 steps.
    c.model.smha.n_experts = 4
    c.model.smha.k = 3
    c.model.smha.capacity_factor = 1.1
    # MLP: 8 experts, half of them for each token, and slots for a quarter more than an even load.
    c.model.uome.n_experts = 8
    c.model.uome.k = 4
    c.model.uome.capacity_factor = 1.25

    c.train.steps = 600
    c.train.batch_size = 8
    c.optimizer.learning_rate = 1.5e-3
    c.optimizer.warmup_steps = 50
    c.eval.every = 150
    c.eval.batch_size = 16
    c.eval.batches = 12
    c.checkpoint.every = 150

    if variant == "dense":  # the same sizes without routing, to compare with
        c.model.attention = "dense"
        c.model.mlp = "dense"
    elif variant:
        raise ValueError(f"there is no variant {variant!r}; give 'dense' or none")
    return c
