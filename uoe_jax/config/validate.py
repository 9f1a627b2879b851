"""Checks of a configuration that need several of its keys; each raises ConfigError with the numbers and the remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Mapping

from uoe_jax.config.data import FROM_FILE, SOURCES, sources_of
from uoe_jax.config.fields import leaves
from uoe_jax.config.validate_baselines import check_peers, peer_sizes, peer_uses
from uoe_jax.errors import ConfigError

if TYPE_CHECKING:
    from uoe_jax.config.schema import Config, ModelConfig, RoutingConfig


def divisors(n: int) -> str:
    """The divisors of n, for error sentences."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    found = sorted({*low, *(n // d for d in low)})
    return ", ".join(map(str, found[:12])) + (", …" if len(found) > 12 else "")


def check_model(m: ModelConfig) -> None:
    """Checks the model's keys against each other."""
    if m.d_model % m.n_heads:
        raise ConfigError(
            "config.model.n_heads",
            m.n_heads,
            f"must divide d_model={m.d_model}: {divisors(m.d_model)}",
        )
    if m.n_heads % m.kv_heads:
        raise ConfigError(
            "config.model.n_kv_heads",
            m.n_kv_heads,
            f"must divide n_heads={m.n_heads}: {divisors(m.n_heads)}",
        )
    if m.position == "rope" and m.head_dim % 2:
        odd = f"cuts d_model={m.d_model} into heads of odd width {m.head_dim}"
        remedy = f"{odd}; rope needs even, so give fewer heads, or position='learned'"
        raise ConfigError("config.model.n_heads", m.n_heads, remedy)
    if m.qkv_bias and (m.bias or m.attention not in ("dense", "smha")):
        remedy = (
            "model.bias has these already; give one of both"
            if m.bias
            else "is for model.attention='dense' or 'smha'"
        )
        raise ConfigError("config.model.qkv_bias", True, remedy)
    check_stretch(m)
    check_task(m)
    check_cutoffs(m, m.vocab_size)
    for name, r in m.unions().items():
        check_routing(f"config.model.{name}", r, m)
    check_peers(m)


def check_stretch(m: ModelConfig) -> None:
    """Checks the stretching of rotary frequencies."""
    if not m.rope_scaling:
        return
    name = "config.model.rope_scaling"
    if m.position != "rope":
        raise ConfigError(
            name,
            m.rope_scaling,
            f"is for rotary positions, and config.model.position={m.position!r}; use ''",
        )
    try:
        stretch = m.rope_stretch
    except ValueError:
        stretch = None
    factor, low, high, length = stretch or (0.0, 0.0, 0.0, 0.0)
    if not (1 <= factor < 1e6 and 0 < low < high < 1e6 and 1 <= length < 1e12):
        remedy = "give four numbers, factor (1 or more), low, high (above low) and length in tokens, such as '8,1,4,8192'"
        raise ConfigError(name, m.rope_scaling, remedy)


def check_cutoffs(m: ModelConfig, vocabulary: int) -> None:
    """Checks the adaptive softmax against the model and the number of words, 0 where that is not known yet."""
    name = "config.model.cutoffs"
    if not m.cutoffs:
        if m.cutoff_div != 1:
            raise ConfigError(
                "config.model.cutoff_div",
                m.cutoff_div,
                "narrows the pieces of model.cutoffs; give those, or 1",
            )
        return
    parts = [part.strip() for part in m.cutoffs.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 10 for part in parts):
        raise ConfigError(
            name,
            m.cutoffs,
            "give whole numbers with commas between them, such as '20000,40000,200000'",
        )
    cutoffs = m.cutoff_list
    if m.task != "language":
        raise ConfigError(
            name, m.cutoffs, "a classifier has no words to predict; use '', or task='language'"
        )
    if cutoffs[0] < 1 or any(a >= b for a, b in zip(cutoffs, cutoffs[1:])):
        raise ConfigError(
            name,
            m.cutoffs,
            "every number must be larger than the one before it, and the first at least 1",
        )
    if vocabulary and cutoffs[-1] >= vocabulary:
        raise ConfigError(
            name,
            m.cutoffs,
            f"the vocabulary has {vocabulary} words; leave out what is not below that",
        )
    if m.d_model % m.cutoff_div ** len(cutoffs):
        narrowest = f"cutoff_div to the power of {len(cutoffs)}, the number of cutoffs, must divide d_model={m.d_model}"
        raise ConfigError(
            "config.model.cutoff_div", m.cutoff_div, f"{narrowest}: {divisors(m.d_model)}"
        )


def check_task(m: ModelConfig) -> None:
    """Checks what the model is for against what comes in and out."""
    if m.task == "language":
        if m.stem != "tokens":
            raise ConfigError(
                "config.model.stem",
                m.stem,
                "a language model reads tokens; use 'tokens', or task='classify'",
            )
        return
    if m.causal and m.classifier.pooling == "cls":
        remedy = "in a causal model the token in front sees none of the others; use 'mean', or causal=False"
        raise ConfigError("config.model.classifier.pooling", "cls", remedy)
    if m.stem == "image":
        image = m.image
        for side in ("height", "width"):
            if getattr(image, side) % image.patch:
                remedy = f"must divide the {side} of {getattr(image, side)} pixels: {divisors(getattr(image, side))}"
                raise ConfigError("config.model.image.patch", image.patch, remedy)
        if m.context_length != image.n_tokens:
            squares = f"an image of {image.height} x {image.width} in squares of {image.patch}"
            remedy = f"{squares} has {image.n_tokens} tokens; give that"
            raise ConfigError("config.model.context_length", m.context_length, remedy)


def check_routing(name: str, r: RoutingConfig, m: ModelConfig) -> None:
    """Checks one routed block against the model it stands in."""
    if r.k > r.n_experts:
        raise ConfigError(
            f"{name}.k", r.k, f"a patch cannot choose more than n_experts={r.n_experts} experts"
        )
    if r.gate == "normalized" and r.k == 1:
        remedy = "with k=1 the rescaled score is always 1 and the router would not learn; choose sigmoid or k >= 2"
        raise ConfigError(f"{name}.gate", r.gate, remedy)
    if m.task == "language" and m.context_length % r.patch_size:
        raise ConfigError(
            f"{name}.patch_size", r.patch_size, f"must divide context_length={m.context_length}"
        )
    if name.endswith("uome") and m.d_hidden % r.n_experts:
        remedy = f"must divide d_hidden={m.d_hidden}: {divisors(m.d_hidden)}"
        raise ConfigError(f"{name}.n_experts", r.n_experts, remedy)
    if name.endswith("smha") and m.kv_heads % r.n_experts:  # kv_heads divides n_heads
        heads = f"n_heads={m.n_heads}" if m.kv_heads == m.n_heads else f"n_kv_heads={m.kv_heads}"
        remedy = f"must divide {heads}, as every expert owns its heads: {divisors(m.kv_heads)}"
        raise ConfigError(f"{name}.n_experts", r.n_experts, remedy)
    if r.sequence_capacity_factor and r.unit == "patch":
        remedy = "bounds whole sequences and here each patch chooses; use 0, or unit='sequence' or 'hierarchical'"
        raise ConfigError(f"{name}.sequence_capacity_factor", r.sequence_capacity_factor, remedy)
    if r.sequence_capacity_factor and r.dispatch == "onehot":
        remedy = "the one-hot product has a row for every sequence, and sequence_capacity_factor bounds them; use 'auto'"
        raise ConfigError(f"{name}.dispatch", r.dispatch, remedy)
    if m.causal and r.unit != "patch":
        remedy = "in a causal model the whole sequence is not known yet when its first patch is routed; use unit='patch'"
        raise ConfigError(f"{name}.unit", r.unit, remedy)
    if m.causal and r.priority != "position":
        remedy = "in a causal model a slot given by score depends on later patches; use priority='position'"
        raise ConfigError(f"{name}.priority", r.priority, remedy)


def check_training(c: Config, prompt_tokens: int) -> None:
    """Checks what `uoe train` asks beyond a sound configuration, before anything is read or compiled.

    prompt_tokens: of generate.prompt, with the separator in front.
    """
    m, classify = c.model, c.model.task == "classify"
    check_source(c)
    check_idle(c)
    if c.eval.test and not c.checkpoint.keep_best:
        raise ConfigError(
            "config.checkpoint.keep_best",
            0,
            "eval.test measures the best checkpoint; give 1 or more",
        )
    if classify:
        return check_labelled(c)
    if not m.causal:
        raise ConfigError(
            "config.model.causal",
            False,
            "a language model would see the tokens it is to predict; use True",
        )
    if c.data.source == "tfds_text" and not c.data.name:
        raise ConfigError(
            "config.data.name", "", "source='tfds_text' needs a dataset's name, such as 'lm1b'"
        )
    if prompt_tokens >= m.context_length:
        room = f"its {prompt_tokens} tokens leave no room in config.model.context_length={m.context_length}"
        raise ConfigError(
            "config.generate.prompt",
            c.generate.prompt,
            f"{room}; shorten it, or give a longer context",
        )


def check_source(c: Config) -> None:
    """Checks that the data are for what the model is for."""
    fitting = sources_of(c.model.task)
    if c.data.source not in fitting:
        remedy = f"with config.model.task={c.model.task!r} it must be one of {', '.join(fitting)}"
        raise ConfigError("config.data.source", c.data.source, remedy)


def check_idle(c: Config) -> None:
    """Refuses keys that were set and would change nothing."""
    m, d, classify = c.model, c.data, c.model.task == "classify"
    facts = SOURCES[d.source].facts
    text = facts is None or facts.text
    uses = (
        ("augment.", m.stem == "image", "is for images (model.stem='image')"),
        (
            "augment.rand_magnitude",
            c.augment.rand_layers,
            "is for augment.rand_layers of 1 or more",
        ),
        ("data.listops.", d.source == "listops", "is for data.source='listops'"),
        (
            "data.pathfinder.",
            d.source == "pathfinder" and not d.path,
            "is for generated images: source='pathfinder' without data.path",
        ),
        (
            "data.path",
            d.source not in ("listops", "digits"),
            f"data.source={d.source!r} has no files; leave it out",
        ),
        ("data.held_out", d.source == "text", "is for data.source='text'"),
        ("data.name", d.source == "tfds_text", "is for data.source='tfds_text'"),
        ("data.buckets", classify and (text or d.source == "listops"), "is for labelled text"),
        ("data.sort_window", d.buckets > 1, "is for data.buckets of 2 or more"),
        ("data.min_count", d.tokenizer == "words", "is for data.tokenizer='words'"),
        (
            "data.tokenizer_file",
            d.tokenizer in FROM_FILE,
            "is for data.tokenizer='bpe' or 'library'",
        ),
        ("data.tokenizer", text, f"is for text, and data.source={d.source!r} has none"),
        ("train.label_smoothing", classify, "is for classes (model.task='classify')"),
        ("model.classifier.", classify, "is for classes (model.task='classify')"),
        ("model.image.", m.stem == "image", "is for images (model.stem='image')"),
        ("model.vocab_size", m.stem == "tokens", "is for tokens (model.stem='tokens')"),
        *peer_uses(m),
    )
    for name, value, meta in leaves(c):
        for prefix, used, remedy in uses:
            if (
                not used
                and value != meta["default"]
                and (name == prefix or prefix.endswith(".") and name.startswith(prefix))
            ):
                raise ConfigError(f"config.{name}", value, remedy)


def check_labelled(c: Config) -> None:
    """Checks a classifier against the examples it is to learn from."""
    m, d, facts = c.model, c.data, SOURCES[c.data.source].facts
    assert facts is not None  # `check_source`
    for name, given, wanted in (
        ("n_classes", m.classifier.n_classes, facts.n_classes), ("n_inputs", m.classifier.n_inputs, facts.n_inputs)
    ):  # fmt: skip
        if given != wanted:
            raise ConfigError(
                f"config.model.classifier.{name}",
                given,
                f"data.source={d.source!r} has {wanted}; give that",
            )
    if facts.image is None:
        if m.stem == "image":
            raise ConfigError(
                "config.model.stem",
                "image",
                f"data.source={d.source!r} has no images; use 'tokens'",
            )
        if d.source == "listops" and d.listops.max_length > m.context_length + 1:
            remedy = f"expressions of fewer than data.listops.max_length={d.listops.max_length} tokens must fit; give that"
            raise ConfigError("config.model.context_length", m.context_length, remedy)
        return
    side = d.pathfinder.size if d.source == "pathfinder" else 0
    height, width, channels = (known or side for known in facts.image)
    sides = {"height": m.image.height, "width": m.image.width, "channels": m.image.channels}
    if m.stem == "tokens":
        if height and m.context_length != height * width:
            remedy = f"an image of {height} x {width} pixels has {height * width} tokens; give that"
            raise ConfigError("config.model.context_length", m.context_length, remedy)
        return
    for name, wanted in {"height": height, "width": width, "channels": channels}.items():
        if wanted and sides[name] != wanted:
            raise ConfigError(
                f"config.model.image.{name}",
                sides[name],
                f"data.source={d.source!r} has {wanted}; give that",
            )


def check_run(c: Config) -> None:
    """Checks across sections."""
    if c.train.batch_size % c.train.accumulation:
        remedy = (
            f"must divide train.batch_size={c.train.batch_size}: {divisors(c.train.batch_size)}"
        )
        raise ConfigError("config.train.accumulation", c.train.accumulation, remedy)
    if c.optimizer.moment_dtype == "bfloat16" and c.optimizer.b2 > 0.95:
        remedy = f"a second moment that moves by 1 - b2 of itself, b2={c.optimizer.b2}, stands still in 8 bits; use float32, or b2 up to 0.95"
        raise ConfigError("config.optimizer.moment_dtype", "bfloat16", remedy)
    axes = c.mesh.shape
    for axis, size in axes.items():
        if size == 0:
            raise ConfigError(
                f"config.mesh.{axis}", size, "give a positive size, or -1 for what is left"
            )
    free = [a for a, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(
            f"config.mesh.{free[1]}", -1, f"only one axis may be -1, and mesh.{free[0]} already is"
        )
    check_sizes(c, {a: max(size, 1) for a, size in axes.items()})


def check_sizes(c: Config, mesh: Mapping[str, int]) -> None:
    """Checks that the model and the batch can be cut evenly over a mesh of such sizes.

    What does not fit a part of a mesh does not fit the whole: before the devices are known, an axis counts as 1.
    """
    m, parts = c.model, mesh["replica"] * mesh["data"] * mesh["fsdp"]
    rows = c.train.batch_size // c.train.accumulation
    largest = max(("replica", "data", "fsdp"), key=lambda a: mesh[a])
    for name, n in (
        ("train.batch_size / train.accumulation", rows),
        ("eval.batch_size", c.eval_batch_size),
    ):
        if n % parts:
            remedy = f"replica*data*fsdp={parts}, the parts the batch is cut in, must divide {name}={n}: {divisors(n)}"
            raise ConfigError(f"config.mesh.{largest}", mesh[largest], remedy)
    cut = {f"model.{name}.n_experts": (r.n_experts, "expert") for name, r in m.unions().items()}
    cut |= {name: (size, "expert") for name, size in peer_sizes(m)}
    if m.attention == "dense":
        cut["model.n_kv_heads" if m.n_kv_heads else "model.n_heads"] = (m.kv_heads, "expert")
    if m.mlp == "dense":
        cut["model.d_hidden"] = (m.d_hidden, "expert")
    cut["model.d_model"] = (m.d_model, "fsdp")
    if m.cutoff_div > 1:  # what divides the narrowest piece divides all
        n = len(m.cutoff_list)
        cut[f"model.d_model / model.cutoff_div**{n}"] = (m.d_model // m.cutoff_div**n, "fsdp")
    if c.mesh.sequence_parallel:
        if c.data.buckets > 1:
            raise ConfigError(
                "config.data.buckets",
                c.data.buckets,
                "rows cut over devices have one length; use 1",
            )
        cut["model.context_length"] = (m.context_length, "expert")
        if m.block_length != m.context_length:
            remedy = "cannot cut the tokens of a row and the one in front of them evenly; use classifier.pooling='mean'"
            raise ConfigError("config.mesh.sequence_parallel", True, remedy)
    for name, (size, axis) in cut.items():
        if size % mesh[axis]:
            raise ConfigError(
                f"config.mesh.{axis}", mesh[axis], f"must divide {name}={size}: {divisors(size)}"
            )
    own = rows // parts * m.rows_per_example
    for name, r in m.routed().items():
        if r.sequence_capacity_factor and own % r.sequence_group:
            remedy = f"must divide the {own} rows of one device's microbatch: {divisors(own)}"
            raise ConfigError(f"config.model.{name}.sequence_group", r.sequence_group, remedy)
