"""Checks across keys; each raises ConfigError with the value, the numbers and the remedy."""

import operator
from collections.abc import Iterator, Mapping, Sized
from typing import Protocol

from uoe_jax.config.baselines import ATTENTIONS, MLPS, NOT_CAUSAL
from uoe_jax.config.data import FROM_FILE, SOURCES, sources_of
from uoe_jax.config.fields import divisors, leaves, must_divide, wrong
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.errors import ConfigError

NEVER_LEARNS = "one rescaled weight is always the same, so the router never learns; give 2 or more"
# Keys of model.moe that one mixture alone uses.
OF_ONE_MIXTURE = {
    "deepseek_moe": ("n_shared", "score", "scale", "bias_rate"),
    "xmoe": ("threshold",),
    "skywork_moe": ("logit_scale", "adaptive_rate", "adaptive_decay", "adaptive_most"),
}


class Tokenizer(Protocol):
    """The part of a tokenizer that is needed to check a prompt."""

    def encode(self, text: str) -> Sized: ...


# --- model ---


def check_model(m: ModelConfig) -> None:
    """Checks the model's keys against each other."""
    if m.d_model % m.n_heads:
        raise wrong(m, "n_heads", must_divide("d_model", m.d_model))
    if m.n_heads % m.kv_heads:
        raise wrong(m, "n_kv_heads", must_divide("n_heads", m.n_heads))
    if m.position == "rope" and m.head_dim % 2:
        odd = f"splits d_model={m.d_model} into heads of odd width {m.head_dim}; RoPE needs even"
        raise wrong(m, "n_heads", f"{odd}, so give fewer heads, or position='learned'")
    if m.qkv_bias and m.bias:
        raise wrong(m, "qkv_bias", "is part of model.bias; set only one of them")
    if m.qkv_bias and m.attention not in ("dense", "smha"):
        raise wrong(m, "qkv_bias", "is for model.attention='dense' or 'smha'")
    _check_rope_scaling(m)
    _check_task(m)
    check_cutoffs(m, m.vocab_size)
    for name, r in m.unions().items():
        _check_routing(name, r, m)
    for place, block in (("attention", m.attention), ("mlp", m.mlp)):
        if m.causal and block in NOT_CAUSAL:
            raise wrong(m, place, f"{NOT_CAUSAL[block]}; choose another, or causal=False")
    if m.mlp in MLPS:
        _check_mixture(m)
    if m.attention in ATTENTIONS:
        _check_attention(m)


def _check_rope_scaling(m: ModelConfig) -> None:
    if not m.rope_scaling:
        return
    if m.position != "rope":
        raise wrong(m, "rope_scaling", f"is for model.position='rope', not {m.position!r}; use ''")
    try:
        factor, low, high, length = m.rope_stretch or (0.0, 0.0, 0.0, 0.0)
    except ValueError:
        factor = 0.0
    if not (1 <= factor < 1e6 and 0 < low < high < 1e6 and 1 <= length < 1e12):
        numbers = "factor (at least 1), low, high (above low) and length in tokens"
        raise wrong(m, "rope_scaling", f"give {numbers}, such as '8,1,4,8192'")


def check_cutoffs(m: ModelConfig, vocab_size: int) -> None:
    """Checks the adaptive softmax; vocab_size: of the model, 0 if not known yet."""
    if not m.cutoffs:
        if m.cutoff_div != 1:
            raise wrong(m, "cutoff_div", "is for model.cutoffs; give those, or use 1")
        return
    parts = [part.strip() for part in m.cutoffs.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 10 for part in parts):
        raise wrong(m, "cutoffs", "give whole numbers with commas between, such as '20000,40000'")
    cutoffs = m.cutoff_list
    if m.task != "language":
        raise wrong(m, "cutoffs", "a classifier has no vocabulary; use '', or task='language'")
    if cutoffs[0] < 1 or any(a >= b for a, b in zip(cutoffs, cutoffs[1:])):
        raise wrong(m, "cutoffs", "each must be larger than the one before, the first at least 1")
    if vocab_size and cutoffs[-1] >= vocab_size:
        raise wrong(m, "cutoffs", f"the vocabulary has {vocab_size} entries; stay below that")
    if m.d_model % m.cutoff_div ** len(cutoffs):
        power = f"cutoff_div to the power of {len(cutoffs)}, the number of cutoffs,"
        raise wrong(m, "cutoff_div", f"{power} {must_divide('d_model', m.d_model)}")


def _check_task(m: ModelConfig) -> None:
    """Checks the task against the input and the classifier's head."""
    if m.task == "language" and m.stem != "tokens":
        raise wrong(m, "stem", "a language model reads tokens; use 'tokens', or task='classify'")
    if m.task == "classify" and m.causal and m.classifier.pooling == "cls":
        why = "in a causal model the token in front sees none of the others"
        raise wrong(m, "classifier.pooling", f"{why}; use 'mean', or causal=False")
    if m.stem != "image":
        return
    image = m.image
    for name, n in (("height", image.height), ("width", image.width)):
        if n % image.patch:
            raise wrong(m, "image.patch", f"must divide the {name} of {n} pixels: {divisors(n)}")
    if m.context_length != image.n_tokens:
        patches = f"an image of {image.height} x {image.width} in patches of {image.patch}"
        raise wrong(m, "context_length", f"{patches} has {image.n_tokens} tokens; give that")


def _check_routing(name: str, r: RoutingConfig, m: ModelConfig) -> None:
    """Checks the routing of one union of experts. name: "smha" or "uome"."""
    if r.k > r.n_experts:
        raise wrong(m, f"{name}.k", f"a patch cannot choose more than n_experts={r.n_experts}")
    if r.gate == "normalized" and r.k == 1:
        constant = "with k=1 the normalized weight is always 1 and the router would not learn"
        raise wrong(m, f"{name}.gate", f"{constant}; choose sigmoid or k >= 2")
    if m.task == "language" and m.context_length % r.patch_size:
        raise wrong(m, f"{name}.patch_size", f"must divide context_length={m.context_length}")
    if name == "uome" and m.d_hidden % r.n_experts:
        raise wrong(m, "uome.n_experts", must_divide("d_hidden", m.d_hidden))
    if name == "smha" and m.kv_heads % r.n_experts:  # kv_heads divides n_heads
        heads = f"n_heads={m.n_heads}" if m.kv_heads == m.n_heads else f"n_kv_heads={m.kv_heads}"
        owns = f"must divide {heads}, as every expert owns its heads"
        raise wrong(m, "smha.n_experts", f"{owns}: {divisors(m.kv_heads)}")
    if r.sequence_capacity_factor and r.unit == "patch":
        remedy = "bounds whole sequences, but each patch chooses; use 0, or another unit"
        raise wrong(m, f"{name}.sequence_capacity_factor", remedy)
    if r.sequence_capacity_factor and r.dispatch == "onehot":
        raise wrong(m, f"{name}.dispatch", "takes no sequence_capacity_factor; use 'auto'")
    if m.causal and r.unit != "patch":
        why = "in a causal model the sequence is not known yet when its first patch is routed"
        raise wrong(m, f"{name}.unit", f"{why}; use unit='patch'")
    if m.causal and r.priority != "position":
        why = "slots by score depend on later patches, which a causal model must not see"
        raise wrong(m, f"{name}.priority", f"{why}; use priority='position'")


# --- baselines ---


def _check_mixture(m: ModelConfig) -> None:
    c = m.moe
    rescaled = m.mlp == "skywork_moe" or m.mlp == "deepseek_moe" and c.score == "sigmoid"
    if c.k > c.n_experts:
        raise wrong(m, "moe.k", f"a token cannot choose more than n_experts={c.n_experts}")
    if c.k == 1 < c.n_experts and rescaled:
        raise wrong(m, "moe.k", f"(mlp={m.mlp!r}) {NEVER_LEARNS}")
    if not c.d_expert and m.d_hidden % (c.k + c.n_shared):
        parts = f"k={c.k} + n_shared={c.n_shared} do not divide d_hidden={m.d_hidden}"
        raise wrong(m, "moe.d_expert", f"{parts}; give a width")


def _check_attention(m: ModelConfig) -> None:
    name, kernel = f"attention={m.attention!r}", m.nystromformer.kernel
    if m.attention_dropout and m.attention not in ("mla", "moh", "mosa"):
        raise wrong(m, "attention_dropout", f"{name} has no such weights; use model.dropout")
    if m.attention in ("mosa", "mla", "reformer") and m.kv_heads != m.n_heads:
        raise wrong(m, "n_kv_heads", f"heads of {name} have own keys; give {m.n_heads}, or 0")
    if m.attention in ("mla", "reformer") and m.qk_norm:
        raise wrong(m, "qk_norm", f"{name} has its own norms; use False")
    if m.attention == "mla" and m.position == "rope" and m.rotary_dim % 2:
        raise wrong(m, "mla.d_rope", f"RoPE needs an even width, and it is {m.rotary_dim}")
    routed = m.n_heads - m.moh.n_shared
    if m.attention == "moh" and m.moh.k > routed:
        heads = f"n_heads={m.n_heads} - n_shared={m.moh.n_shared}"
        raise wrong(m, "moh.k", f"{heads} leave {max(routed, 0)} heads to choose from")
    if m.attention == "moh" and m.moh.k == 1 < routed:
        raise wrong(m, "moh.k", NEVER_LEARNS)
    if m.attention == "nystromformer" and kernel and kernel % 2 == 0:
        raise wrong(m, "nystromformer.kernel", "give an odd number, or 0")
    if m.attention == "long_short" and m.long_short.window % 2:
        raise wrong(m, "long_short.window", "half is seen on either side; give an even number")


# --- data and training ---


def check_training(c: Config, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Checks what `uoe train` needs of a valid configuration, before data are read.

    vocab_size: of the data; 0 if not known yet. tokenizer: of the text; None if there is none, or
    if its vocabulary is not counted yet.
    """
    check_source(c)
    _check_used(c)
    if c.eval.test and not c.checkpoint.keep_best:
        raise wrong(c, "checkpoint.keep_best", "eval.test measures the best one; give 1 or more")
    if c.model.task == "classify":
        _check_labelled(c)
    else:
        _check_language(c, tokenizer)
    check_vocabulary(c.model, vocab_size)


def _check_language(c: Config, tokenizer: Tokenizer | None) -> None:
    m, prompt = c.model, c.generate.prompt
    if not m.causal:
        raise wrong(m, "causal", "a language model would see what it predicts; use True")
    if c.data.source == "tfds_text" and not c.data.name:
        raise wrong(c, "data.name", "source='tfds_text' needs a dataset's name, such as 'lm1b'")
    n = 1 + len(tokenizer.encode(prompt) if tokenizer else prompt.split())
    if n >= m.context_length:
        room = f"its {n} tokens leave no room in config.model.context_length={m.context_length}"
        raise wrong(c, "generate.prompt", f"{room}; shorten it, or give a longer context")


def check_vocabulary(m: ModelConfig, size: int) -> None:
    """Checks the model against a vocabulary of `size` entries."""
    if m.vocab_size and m.vocab_size < size:
        raise wrong(m, "vocab_size", f"the data have {size} tokens; give at least that, or 0")
    check_cutoffs(m, m.vocab_size or size)


def check_source(c: Config) -> None:
    """Checks that the source suits the task."""
    fitting = sources_of(c.model.task)
    if c.data.source not in fitting:
        remedy = f"with config.model.task={c.model.task!r} it must be one of {', '.join(fitting)}"
        raise wrong(c, "data.source", remedy)


def _check_used(c: Config) -> None:
    """Refuses keys that were set and have no effect."""
    m, d, classify = c.model, c.data, c.model.task == "classify"
    facts = SOURCES[d.source].facts
    text = facts is None or facts.text
    no_files = f"data.source={d.source!r} has no files; leave it out"
    generated = "is for generated images: source='pathfinder' without data.path"
    # (a key, or a section with its dot; whether it has an effect; the remedy)
    uses = [
        ("augment.", m.stem == "image", "is for images (model.stem='image')"),
        ("augment.rand_magnitude", c.augment.rand_layers > 0, "is for augment.rand_layers > 0"),
        ("data.listops.", d.source == "listops", "is for data.source='listops'"),
        ("data.pathfinder.", d.source == "pathfinder" and not d.path, generated),
        ("data.path", d.source not in ("listops", "digits"), no_files),
        ("data.held_out", d.source == "text", "is for data.source='text'"),
        ("data.name", d.source == "tfds_text", "is for data.source='tfds_text'"),
        ("data.buckets", classify and (text or d.source == "listops"), "is for labelled text"),
        ("data.sort_window", d.buckets > 1, "is for data.buckets of 2 or more"),
        ("data.min_count", d.tokenizer == "words", "is for data.tokenizer='words'"),
        ("data.tokenizer_file", d.tokenizer in FROM_FILE, "is for tokenizer='bpe' or 'library'"),
        ("data.tokenizer", text, f"is for text, and data.source={d.source!r} has none"),
        ("train.label_smoothing", classify, "is for classifiers (model.task='classify')"),
        ("model.classifier.", classify, "is for classifiers (model.task='classify')"),
        ("model.image.", m.stem == "image", "is for images (model.stem='image')"),
        ("model.vocab_size", m.stem == "tokens", "is for tokens (model.stem='tokens')"),
    ]
    # Not the sections of unions: config files set them for variants with other blocks too.
    for name in ATTENTIONS:
        uses.append((f"model.{name}.", m.attention == name, f"is for model.attention={name!r}"))
    mixtures = " or ".join(f"model.mlp={name!r}" for name in MLPS)
    uses.append(("model.moe.", m.mlp in MLPS, f"is for {mixtures}"))
    for block, names in OF_ONE_MIXTURE.items():
        used, remedy = m.mlp == block, f"is for model.mlp={block!r}"
        uses += [(f"model.moe.{name}", used, remedy) for name in names]
    remedy = "has no effect if experts choose (model.mlp='expert_choice')"
    for name in ("balance_weight", "capacity_window"):
        uses.append((f"model.moe.{name}", m.mlp != "expert_choice", remedy))
    idle = [(place, remedy) for place, used, remedy in uses if not used]
    for name, value, meta in leaves(c):
        for place, remedy in idle if value != meta["default"] else ():
            if name == place or place.endswith(".") and name.startswith(place):
                raise wrong(c, name, remedy)


def _check_labelled(c: Config) -> None:
    """Checks a classifier against its labelled source."""
    m, d, facts = c.model, c.data, SOURCES[c.data.source].facts
    assert facts is not None  # `check_source`
    has = f"data.source={d.source!r} has"
    side = d.pathfinder.size if d.source == "pathfinder" else 0
    height, width, channels = (known or side for known in facts.image or (0, 0, 0))
    sizes = {"classifier.n_classes": facts.n_classes, "classifier.n_inputs": facts.n_inputs}
    if m.stem == "image":
        sizes |= {"image.height": height, "image.width": width, "image.channels": channels}
    for name, size in sizes.items():
        if size and operator.attrgetter(name)(m) != size:
            raise wrong(m, name, f"{has} {size}; give that")
    if m.stem == "image" and facts.image is None:
        raise wrong(m, "stem", f"{has} no images; use 'tokens'")
    if m.stem == "tokens" and height and m.context_length != height * width:
        tokens = f"an image of {height} x {width} pixels has {height * width} tokens"
        raise wrong(m, "context_length", f"{tokens}; give that")
    if d.source == "listops" and d.listops.max_length > m.context_length + 1:
        limit = f"fewer than data.listops.max_length={d.listops.max_length} tokens"
        raise wrong(m, "context_length", f"expressions of {limit} must fit; give that")


# --- batch and mesh ---


def check_run(c: Config) -> None:
    """Checks across sections."""
    if c.train.batch_size % c.train.accumulation:
        raise wrong(c, "train.accumulation", must_divide("train.batch_size", c.train.batch_size))
    if c.optimizer.moment_dtype == "bfloat16" and c.optimizer.b2 > 0.95:
        why = f"bfloat16 cannot represent the second moment's updates at b2={c.optimizer.b2}"
        raise wrong(c, "optimizer.moment_dtype", f"{why}; use float32, or b2 <= 0.95")
    for axis, size in c.mesh.shape.items():
        if size == 0:
            raise wrong(c, f"mesh.{axis}", "give a positive size, or -1 for the remaining devices")
    free = [axis for axis, size in c.mesh.shape.items() if size == -1]
    if len(free) > 1:
        raise wrong(c, f"mesh.{free[1]}", f"only one axis may be -1, and mesh.{free[0]} already is")
    check_sizes(c, {axis: max(size, 1) for axis, size in c.mesh.shape.items()})


def check_sizes(c: Config, mesh: Mapping[str, int]) -> None:
    """Checks that the axes of a mesh (axis -> size) divide what they shard.

    While the number of devices is unknown, an axis of -1 counts as 1: sizes that do not fit a
    smaller mesh do not fit the whole one either.
    """
    m, shards = c.model, mesh["replica"] * mesh["data"] * mesh["fsdp"]
    rows = c.train.batch_size // c.train.accumulation
    largest = max(("replica", "data", "fsdp"), key=lambda axis: mesh[axis])
    batches = {"train.batch_size / train.accumulation": rows, "eval.batch_size": c.eval_batch_size}
    for name, n in batches.items():
        if n % shards:
            remedy = f"replica*data*fsdp={shards}, the shards of a batch, {must_divide(name, n)}"
            raise ConfigError(f"config.mesh.{largest}", mesh[largest], remedy)
    if c.mesh.sequence_parallel and c.data.buckets > 1:
        raise wrong(c, "data.buckets", "mesh.sequence_parallel takes rows of one length; use 1")
    if c.mesh.sequence_parallel and m.block_length != m.context_length:
        why = "cannot shard the tokens of a row and the classifier's own token evenly"
        raise wrong(c, "mesh.sequence_parallel", f"{why}; use classifier.pooling='mean'")
    for name, size, axis in _sharded_sizes(c):
        if size % mesh[axis]:
            raise ConfigError(f"config.mesh.{axis}", mesh[axis], must_divide(name, size))
    local = rows // shards * m.rows_per_example
    for name, r in m.routed().items():
        if r.sequence_capacity_factor and local % r.sequence_group:
            remedy = f"must divide the {local} rows of one device's microbatch: {divisors(local)}"
            raise wrong(m, f"{name}.sequence_group", remedy)


def _sharded_sizes(c: Config) -> Iterator[tuple[str, int, str]]:
    """(name, size, mesh axis) of every size that an axis must divide."""
    m = c.model
    for name, r in m.unions().items():
        yield f"model.{name}.n_experts", r.n_experts, "expert"
    if m.attention != "smha":
        yield "model.n_kv_heads" if m.n_kv_heads else "model.n_heads", m.kv_heads, "expert"
    if m.mlp == "dense":
        yield "model.d_hidden", m.d_hidden, "expert"
    if m.mlp in MLPS:
        yield "model.moe.n_experts", m.moe.n_experts, "expert"
        yield "model.moe.n_shared * model.moe.d_expert", m.whole_hidden, "expert"  # may be 0
    yield "model.d_model", m.d_model, "fsdp"
    if m.cutoff_div > 1:  # what divides the narrowest cluster divides all
        n = len(m.cutoff_list)
        yield f"model.d_model / model.cutoff_div**{n}", m.d_model // m.cutoff_div**n, "fsdp"
    if c.mesh.sequence_parallel:
        yield "model.context_length", m.context_length, "expert"
