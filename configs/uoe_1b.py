"""A language model of about 1.1 billion parameters on one node of 8 GPUs, its blocks unions of experts. Never trained.

Command:   uoe tokenizer train --config=uoe_1b --config.data.path=DATA_DIR --vocab=32768 --out=bpe.json
           uoe train --config=uoe_1b --config.data.path=DATA_DIR --config.data.tokenizer_file=bpe.json --workdir=DIR
           DATA_DIR is where TensorFlow Datasets prepared c4/en (uoe says how where it is not there). configs/uoe_1b.py
           Small: uoe train --config=uoe_1b:tiny …
Hardware:  one node of 8 GPUs of 80 GB.
Time:      PLAN_TIME
Expected:  not measured. PLAN_MEMORY
"""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "tfds_text"
    c.data.name = "c4/en"
    c.data.tokenizer = "bpe"
    c.generate.prompt = "The"
    c.model.vocab_size = 32768
    c.model.d_model = 2048
    c.model.n_layers = 20
    c.model.n_heads = 16
    c.model.n_kv_heads = 8
    c.model.d_hidden = 7168
    c.model.context_length = 2048
    c.model.activation = "swiglu"
    c.model.tie_embeddings = False
    c.model.dtype = "bfloat16"
    for routing in (c.model.smha, c.model.uome):
        routing.n_experts = 8
        routing.k = 4
        routing.capacity_factor = 1.25
    c.train.steps = 38_000  # of 0.52 million tokens: 20 billion
    c.train.batch_size = 256
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 1000
    c.eval.every = c.checkpoint.every = 1000
    c.eval.batches = 8
    c.mesh.data, c.mesh.fsdp = 1, -1
    if variant == "tiny":
        c.model.vocab_size = 0
        return uoe.tiny(c)
    if variant:
        raise ValueError(f"there is no variant {variant!r}; give 'tiny' or none")
    return c
