"""WikiText-103, word by word, as in the paper's released code: 16 layers, D 400.

Command:   uoe train --config=wikitext103 --config.data.path=DIR --workdir=runs/wikitext103
           DIR holds wikitext-103-raw-v1.zip, or what it unpacks to.
           uoe train --config=wikitext103:tiny … five steps of a small model.
Hardware:  meant for one GPU of 40 GB or more.
Time:      not measured.
Expected:  not measured. The authors' harness carries a memory of 150 tokens from segment to
           segment, which is left out here, so perplexities will not be those of the paper.

Words seen at least three times in the training split are the vocabulary, as in the archive's
tokenised twin; perplexity is per word, and `<eos>` at every line end counts as one.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    recipes.language_by_words(c)
    c.data.source = "wikitext103"
    c.model.n_layers = 16
    c.model.d_model = 400
    c.model.n_heads = 10
    c.model.d_hidden = 2100
    c.model.context_length = 150
    c.model.dropout = 0.1
    c.model.cutoffs = "20000,40000,200000"
    c.model.smha.n_experts, c.model.smha.k = 10, 5
    c.model.smha.capacity_window = c.model.uome.capacity_window = 50
    c.optimizer.warmup_steps = 0
    c.train.steps = 200_000
    c.train.batch_size = 60
    c.eval.every = c.checkpoint.every = 4000
    c.eval.batches = 20
    c.generate.prompt = "The game"
    return recipes.finished(c, variant)
