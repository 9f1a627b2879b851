"""A union-of-experts language model of 7.2 billion parameters. Planned, not trained.

Command:   uoe plan --config=configs/uoe_7b.py --mesh=data=8,fsdp=32,expert=2 --hardware=h100
Hardware:  512 GPUs or TPU chips.
Time:      planned only
Expected:  planned only
"""

from uoe_jax import config as uoe


def get_config():
    c = uoe.base()
    c.model.vocab_size = 32768
    c.model.d_model = 4096
    c.model.n_layers = 32
    c.model.n_heads = 32
    c.model.n_kv_heads = 8
    c.model.d_hidden = 14336
    c.model.context_length = 4096
    c.model.activation = "swiglu"
    c.model.tie_embeddings = False
    c.model.dtype = "bfloat16"
    c.model.rope_theta = 500_000.0
    for routing in (c.model.smha, c.model.uome):
        routing.n_experts = 8
        routing.k = 4
        routing.capacity_factor = 1.25
    c.train.batch_size = 1024  # 4.2 million tokens
    c.mesh.data, c.mesh.fsdp = 1, -1
    return c
