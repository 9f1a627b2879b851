"""WikiText-103 by words, with the sizes of the paper's released code: 16 layers, D 400, every head an expert.

Command:   uoe train --config=wikitext103 --config.data.path=DIR --workdir=runs/wikitext103
           DIR holds wikitext-103-raw-v1.zip, or what it unpacks to.
           uoe train --config=wikitext103:tiny … five steps of a toy on a laptop.
Hardware:  meant for one GPU of 40 GB or more.
Time:      not measured.
Expected:  not measured. The authors' harness carries a memory of 150 tokens from segment to segment, which is left out here,
           so perplexities will not be those of the paper.

Words seen at least three times in the training split are the vocabulary, as in the archive's tokenised twin; perplexity is per
word, and `<eos>` at every line end counts as one.
"""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "wikitext103"
    c.data.tokenizer = "words"
    c.data.min_count = 3
    c.model.n_layers = 16
    c.model.d_model = 400
    c.model.n_heads = 10
    c.model.d_hidden = 2100
    c.model.context_length = 150
    c.model.activation = "relu"
    c.model.dropout = 0.1
    c.model.bias = True
    c.model.norm = "layernorm"
    c.model.dtype = "bfloat16"
    c.model.cutoffs = "20000,40000,200000"
    c.model.smha.n_experts, c.model.smha.k = 10, 5
    c.model.uome.n_experts, c.model.uome.k = 4, 2
    for routing in (c.model.smha, c.model.uome):
        routing.capacity_factor = 1.25
        routing.capacity_window = 50
    c.optimizer.learning_rate = 2.5e-4
    c.optimizer.warmup_steps = 0
    c.optimizer.final_fraction = 0.0
    c.optimizer.weight_decay = 0.0
    c.optimizer.b2 = 0.999
    c.optimizer.clip_norm = 0.25
    c.train.steps = 200_000
    c.train.batch_size = 60
    c.train.log_every = 100
    c.eval.every = c.checkpoint.every = 4000
    c.eval.batches = 20
    c.eval.test = True
    c.generate.prompt = "The game"
    if variant == "tiny":
        c.data.min_count = 1
        c.model.cutoffs = "4,10"
        return uoe.tiny(c)
    if variant:
        raise ValueError(f"there is no variant {variant!r}; give 'tiny' or none")
    return c
