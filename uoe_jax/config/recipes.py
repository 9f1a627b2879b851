"""Shared parts of config files: settings of the paper's released code, and the `tiny` variants."""

from typing import Any

LENGTHS = "64,128,256,512,1024,2048,4096"  # in the paper's figures of time and memory


def long_range_arena(c: Any) -> None:
    """Sizes, routing and optimizer of the released code for all tasks of Long Range Arena."""
    m = c.model
    m.task, m.causal = "classify", False
    m.n_layers, m.d_model, m.n_heads, m.d_hidden = 2, 64, 2, 128
    m.smha.n_experts, m.smha.k = 2, 1
    m.uome.n_experts, m.uome.k = 4, 2
    for routing in (m.smha, m.uome):
        routing.update(priority="score", capacity_factor=1.25)
    c.optimizer.update(learning_rate=1e-4, schedule="linear", final_fraction=0.0, b2=0.999)
    c.train.log_every = 50
    c.eval.test = True  # of the checkpoint that is best on validation


def language_by_words(c: Any) -> None:
    """Tokenizer, routing and optimizer of the released code for both language-modelling corpora."""
    m = c.model
    c.data.tokenizer, c.data.min_count = "words", 3
    m.activation, m.bias, m.norm, m.dtype = "relu", True, "layernorm", "bfloat16"
    m.uome.n_experts, m.uome.k = 4, 2
    m.smha.capacity_factor = m.uome.capacity_factor = 1.25
    c.optimizer.update(learning_rate=2.5e-4, final_fraction=0.0, weight_decay=0.0)
    c.optimizer.update(b2=0.999, clip_norm=0.25)
    c.train.log_every = 100
    c.eval.test = True


def finished(c: Any, variant: str = "", *others: str) -> Any:
    """Ends a config file: returns the `ConfigDict`, or makes it `tiny`.

    others: the variants that the file has applied itself. Raises ValueError for an unknown one.
    """
    if variant not in ("", "tiny", *others):
        names = ", ".join(map(repr, (*others, "tiny")))
        raise ValueError(f"there is no variant {variant!r}; give {names} or none")
    return tiny(c) if variant == "tiny" else c


def compared(made: Any, variant: str, short_rows: tuple[str, ...]) -> Any:
    """Ends the config file of a comparison: `short` and `tiny` keep one seed and some rows."""
    if variant not in ("", "short", "tiny"):
        raise ValueError(f"there is no variant {variant!r}; give 'short', 'tiny' or none")
    if variant:
        made.rows = [row for row in made.rows if row[0] in short_rows]
        made.update(seeds=1, length_rows="", learning_rates="")
    if variant == "short":
        made.base.train.steps //= 3
        made.base.eval.every = made.base.checkpoint.every = 0
        made.update(rounds=8, lengths=",".join(made.lengths.split(",")[:3]))
    if variant == "tiny":
        made.update(rounds=2, lengths="32,64" if made.lengths else "")
    return made


def tiny(c: Any) -> Any:
    """Makes a `ConfigDict` small enough to train five steps on a laptop in seconds.

    Task, source, blocks and routing stay, and so does what the data determine: classes, image
    sizes, and the context length of images.
    """
    m = c.model
    m.n_layers, m.n_heads, m.n_kv_heads, m.dtype = 2, 4, 0, "float32"
    for routing in (m.smha, m.uome):
        routing.update(n_experts=min(routing.n_experts, 4), k=min(routing.k, 2))
    m.d_model, m.d_hidden, m.classifier.d_head = 32, 48, min(m.classifier.d_head, 16)
    m.vocab_size = 0
    if m.task == "language" or c.data.source in ("imdb", "aan"):
        m.context_length = 64
    if c.data.tokenizer == "words":
        c.data.min_count, m.cutoffs = 1, "4,10"
    if c.data.source == "listops":
        c.data.listops.update(min_length=4, max_length=64, n_train=256, n_eval=32)
        m.context_length = 64
    if c.data.source == "pathfinder":
        c.data.pathfinder.update(n_train=256, n_eval=32)
    if c.data.source == "imagenet2012":
        m.image.update(height=32, width=32)
        m.context_length = (32 // m.image.patch) ** 2
    c.train.update(steps=5, batch_size=8, accumulation=1, log_every=1)
    c.optimizer.update(warmup_steps=2, decay_steps=0)
    c.eval.update(every=0, batches=2, batch_size=0)
    c.checkpoint.every = 0
    c.mesh.update(replica=1, data=-1, fsdp=1, expert=1)
    c.generate.max_tokens = 8
    return c
