"""One Billion Word, word by word, as in the paper's released code: 18 layers, D 1024.

Command:   uoe train --config=lm1b --config.data.path=DATA_DIR --workdir=runs/lm1b
           DATA_DIR: where TensorFlow Datasets prepared lm1b (uoe says how).
           uoe train --config=lm1b:tiny … five steps of a small model.
Hardware:  meant for one node of 8 GPUs.
Time:      not measured.
Expected:  not measured. The authors' harness carries a memory of 32 tokens from segment to segment,
           which is left out here, so perplexities will not be those of the paper.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.language_by_words(c)
    c.data.source = "tfds_text"
    c.data.name = "lm1b"
    c.model.n_layers = 18
    c.model.d_model = 1024
    c.model.n_heads = 8
    c.model.d_hidden = 4096
    c.model.context_length = 32
    c.model.cutoffs = "60000,100000,640000"
    c.model.smha.n_experts, c.model.smha.k = 8, 4
    c.model.smha.capacity_window = c.model.uome.capacity_window = 32
    c.optimizer.warmup_steps = 40_000
    c.train.steps = 1_000_000
    c.train.batch_size = 112
    c.eval.every = c.checkpoint.every = 10_000
    c.eval.batches = 50
    c.generate.prompt = "The"
    return recipes.finished(c, variant)
