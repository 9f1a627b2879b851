"""One Billion Word by words, with the sizes of the paper's released code: 18 layers, D 1024, every head an expert.

Command:   uoe train --config=lm1b --config.data.path=DATA_DIR --workdir=runs/lm1b
           DATA_DIR is where TensorFlow Datasets prepared lm1b (uoe says how where it is not there).
           uoe train --config=lm1b:tiny … five steps of a toy on a laptop.
Hardware:  meant for one node of 8 GPUs.
Time:      not measured.
Expected:  not measured. The authors' harness carries a memory of 32 tokens from segment to segment, which is left out here,
           so perplexities will not be those of the paper.
"""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "tfds_text"
    c.data.name = "lm1b"
    c.data.tokenizer = "words"
    c.data.min_count = 3
    c.model.n_layers = 18
    c.model.d_model = 1024
    c.model.n_heads = 8
    c.model.d_hidden = 4096
    c.model.context_length = 32
    c.model.activation = "relu"
    c.model.bias = True
    c.model.norm = "layernorm"
    c.model.dtype = "bfloat16"
    c.model.cutoffs = "60000,100000,640000"
    c.model.smha.n_experts, c.model.smha.k = 8, 4
    c.model.uome.n_experts, c.model.uome.k = 4, 2
    for routing in (c.model.smha, c.model.uome):
        routing.capacity_factor = 1.25
        routing.capacity_window = 32
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup_steps = 40_000
    c.optimizer.final_fraction = 0.0
    c.optimizer.weight_decay = 0.0
    c.optimizer.b2 = 0.999
    c.optimizer.clip_norm = 0.25
    c.train.steps = 1_000_000
    c.train.batch_size = 112
    c.train.log_every = 100
    c.eval.every = c.checkpoint.every = 10_000
    c.eval.batches = 50
    c.eval.test = True
    c.generate.prompt = "The"
    if variant == "tiny":
        c.data.min_count = 1
        c.model.cutoffs = "4,10"
        return uoe.tiny(c)
    if variant:
        raise ValueError(f"there is no variant {variant!r}; give 'tiny' or none")
    return c
