"""A language model of 7.25 billion parameters in the shape of Mistral 7B. Planned, not trained.

Command:   uoe plan --config=configs/uoe_7b.py --mesh=data=8,fsdp=64 --hardware=h100
           uoe train --config=configs/uoe_7b.py --workdir=DIR --config.mesh.data=8
Hardware:  512 GPUs or TPU chips.
Time:      planned only: 0.42 to 1.07 s a step of 4.2 million tokens, thus 3 to 7 hours for the
           24,000 steps, with attention that holds no scores. (uoe plan --config=uoe_7b
           --mesh=data=8,fsdp=64 --hardware=h100, 2026-11-25, Python 3.11.7, jax 0.10.2; the plan
           itself took 10 s on 2 CPU cores. Nothing was measured on an accelerator.)
Expected:  planned only: 24.0 GB of the 80 GB of an H100, 23 to 59 % of its peak. No loss is known:
           it was never trained.

The text is C4 as TensorFlow Datasets prepares it (--config.data.path=DATA_DIR), with a BPE
tokenizer that is trained first: uoe tokenizer train --config=uoe_7b --vocab=32768 --out=bpe.json,
and then --config.data.tokenizer_file=bpe.json.
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
    c.train.steps = 24_000  # of 4.2 million tokens: 100 billion
    c.train.batch_size = 1024
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 1000
    c.eval.every = c.checkpoint.every = 1000
    c.eval.batches = 8
    c.mesh.data, c.mesh.fsdp = (
        1,
        -1,
    )  # --config.mesh.data=8 where the gathers of weights would cross too many machines
    return recipes.finished(c, variant)
