"""A language model of 1.27 billion parameters for one node of 8 GPUs. Planned, not trained.

Command:   uoe tokenizer train --config=uoe_1b --config.data.path=DIR --vocab=32768 --out=bpe.json
           uoe train --config=uoe_1b --workdir=runs/1b --config.data.path=DIR
           with --config.data.tokenizer_file=bpe.json
           DIR: where TensorFlow Datasets prepared c4/en (uoe says how).
           Small: uoe train --config=uoe_1b:tiny …
Hardware:  one node of 8 GPUs of 80 GB.
Time:      planned only: 0.69 to 1.0 s a step of 0.52 million tokens, thus 7 to 11 hours for the
           38,000 steps, with attention that holds no scores. (uoe plan --config=uoe_1b
           --mesh=fsdp=8 --hardware=h100, 2026-11-30, Python 3.11.7, jax 0.10.2. Nothing was
           measured on an accelerator.)
Expected:  planned only: 31.9 GB of the 80 GB of an H100, 32 to 47 % of its peak. No loss is known:
           it was never trained.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


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
    c.train.accumulation = 2  # with 1, the plan is 75 of 80 GB, which leaves too little
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 1000
    c.eval.every = c.checkpoint.every = 1000
    c.eval.batches = 8
    c.mesh.data, c.mesh.fsdp = 1, -1
    return recipes.finished(c, variant)
