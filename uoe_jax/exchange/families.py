"""Families of dense models in Hugging Face's layout: their config.json against our `model` section, their tensors against ours.

Both are read in both directions. A family says how a config.json becomes our keys (`model`) and how our model becomes a config.json
(`config`); our model is of a family exactly where the second and then the first give it back. Its tensors are listed once
(`entries`), each with the leaves of ours that it holds. Layouts: the `modeling_*.py` files of `transformers` 5.24. No jax is imported.

Letters as in `layers.common`; leaves are those of the dense model (`decompose.dense_config`), one layer of them where `{i}` is in a name.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import numpy as np

from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import ModelConfig
from uoe_jax.errors import UserError
from uoe_jax.exchange.config_keys import DEFAULTS, GENERATION, IGNORED, Keys

Values = dict[str, Any]


class Form(NamedTuple):
    """How an array of theirs holds one of ours: into (theirs, our shape) -> ours; back (ours) -> theirs. No number changes."""

    into: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def linear(n_in: int = 1) -> Form:
    """A torch Linear [out,in]; the first `n_in` axes of ours are the input's."""
    return Form(
        lambda t, shape: t.T.reshape(shape), lambda a: a.reshape(math.prod(a.shape[:n_in]), -1).T
    )


def kernel(n_in: int = 1) -> Form:
    """GPT-2's Conv1D [in,out]."""
    return Form(
        lambda t, shape: t.reshape(shape), lambda a: a.reshape(math.prod(a.shape[:n_in]), -1)
    )


SAME = Form(lambda t, shape: t.reshape(shape), lambda a: a)
FLAT = Form(lambda t, shape: t.reshape(shape), lambda a: a.reshape(-1))


def under(n: int) -> Form:
    """Ours below `n` axes of size 1."""
    return Form(lambda t, shape: t.reshape(shape), lambda a: a.reshape((1,) * n + a.shape))


def pixels(patch: int, channels: int) -> Form:
    """A convolution [D,channels,patch,patch] over squares as a projection [patch·patch·channels,D] of their pixels, row by row."""
    return Form(
        lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
        lambda a: a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    )


class Entry(NamedTuple):
    """One tensor of theirs and the leaves of ours it holds, side by side along its last axis where there are several."""

    theirs: str
    ours: tuple[str, ...]
    form: Form


def into_ours(entry: Entry, theirs: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The leaves of ours in a tensor of theirs."""
    if len(shapes) == 1:
        return [entry.form.into(theirs, shapes[0])]
    lead = math.prod(theirs.shape[:-1])
    widths = np.cumsum([math.prod(shape) // lead for shape in shapes])[:-1]
    return [
        entry.form.into(part, shape)
        for part, shape in zip(np.split(theirs, widths, axis=-1), shapes)
    ]


def into_theirs(entry: Entry, ours: list[np.ndarray]) -> np.ndarray:
    """The inverse of `into_ours`."""
    parts = [entry.form.back(a) for a in ours]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def their_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the tensor that holds leaves of these shapes; nothing is allocated."""
    parts = [_shape_only(entry.form.back, shape) for shape in shapes]
    return (*parts[0][:-1], sum(part[-1] for part in parts))


def _shape_only(back: Callable[[Any], Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    return back(
        np.lib.stride_tricks.as_strided(np.zeros(1, np.bool_), shape, (0,) * len(shape))
    ).shape


class Family(NamedTuple):
    """One layout. kind: as an error names it. optional: prefix that old files leave out of all names."""

    kind: str
    model: Callable[[Keys], Values]
    config: Callable[[ModelConfig], Values]
    entries: Callable[[ModelConfig], Iterator[Entry]]
    prefix: str = ""


PLAIN = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def _theirs(names: Mapping[str, str], ours: str) -> str:
    """The first of their names for an activation; ours where there is none, which the way back then does not give."""
    return next((theirs for theirs, own in names.items() if own == ours), ours)


# --- Llama, Mistral, Qwen2 ------------------------------------------------------------------------------------------

ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)  # of llama3's scaling
THETA, MISTRAL_WINDOW = 10000.0, 4096  # of their classes, where config.json is silent


def _llama_model(keys: Keys) -> Values:
    kind = keys.get("model_type")
    d, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    keys.only("head_dim", None, d // heads)
    keys.only("attention_bias", False, None, *[True] * (kind == "qwen2"))
    for key in ("mlp_bias", "use_sliding_window"):
        keys.only(key, False, None)
    _check_layer_types(keys)
    context = keys.whole("max_position_embeddings")
    if kind == "mistral":
        window = keys.whole(
            "sliding_window", context if "sliding_window" in keys else MISTRAL_WINDOW
        )
        context = min(context, window)
    elif kind == "qwen2":
        keys.get("sliding_window")  # which use_sliding_window turns off
    theta, stretch = _rope(keys)
    return dict(
        task="language", stem="tokens", causal=True, vocab_size=keys.whole("vocab_size"), d_model=d,
        n_layers=keys.whole("num_hidden_layers"), n_heads=heads,
        n_kv_heads=keys.whole("num_key_value_heads", 8 if kind == "mistral" and "num_key_value_heads" not in keys else heads),
        d_hidden=keys.whole("intermediate_size"), context_length=context, activation=keys.name("hidden_act", GATED),
        norm="rmsnorm", norm_eps=keys.number("rms_norm_eps"), qk_norm=False, position="rope", rope_theta=theta,
        rope_scaling=stretch, bias=False, qkv_bias=kind == "qwen2",
        tie_embeddings=keys.flag("tie_word_embeddings", False), cutoffs="",
    )  # fmt: skip


def _check_layer_types(keys: Keys) -> None:
    found = keys.get("layer_types") or []
    if not isinstance(found, list) or any(kind != "full_attention" for kind in found):
        raise keys.wrong(
            "layer_types", found, "for which there is no block here (full_attention works)"
        )


def _rope(keys: Keys) -> tuple[float, str]:
    """(theta, `model.rope_scaling`). transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`.

    Raises:
      UserError: both are there and differ, or the kind of frequencies has no code here.
    """
    theta = keys.number("rope_theta", None)
    top = keys.number("original_max_position_embeddings", None)
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        section = keys.section(name)
        if section is not None:
            found[name] = _rope_section(section, theta, top)
    if len(set(found.values())) > 1:
        raise UserError(
            f"{keys.file} has rope_parameters and rope_scaling that differ; make them one"
        )
    return next(iter(found.values()), (theta or THETA, ""))


def _rope_section(keys: Keys, theta: float | None, top: float | None) -> tuple[float, str]:
    kind = (
        keys.only("rope_type" if keys.has("rope_type") else "type", "default", "llama3", None)
        or "default"
    )
    if (keys.get("type") or kind) != kind:
        raise keys.wrong("rope_type", kind, f"and type={keys.get('type')!r}; make them one")
    own = keys.number("rope_theta", None)
    if None not in (own, theta) and own != theta:
        raise keys.wrong(
            "rope_theta", own, f"and config.json itself has rope_theta={theta}; make them one"
        )
    numbers: list[float] = []
    if kind == "llama3":
        length = keys.number(ROPE[3], top)
        if length is None:
            raise UserError(f"{keys.file} has no {ROPE[3]}, which llama3 takes; give it")
        if not length.is_integer():
            raise keys.wrong(ROPE[3], length, "give a whole number")
        if (top or length) != length:
            raise keys.wrong(ROPE[3], length, f"and config.json itself has {top}; make them one")
        numbers = [*(keys.number(name) for name in ROPE[:3]), length]
    keys.close(
        frozenset(), {"partial_rotary_factor": (1.0, 1), **dict.fromkeys(ROPE[:1], (1.0, 1))}
    )
    return own or theta or THETA, ",".join(f"{number:.12g}" for number in numbers)


def _llama_config(m: ModelConfig) -> Values:
    kind = "qwen2" if m.qkv_bias else "llama"
    scaling: Values | None = None
    if m.rope_stretch:
        scaling = {
            "rope_type": "llama3",
            **dict(zip(ROPE, m.rope_stretch)),
            ROPE[-1]: int(m.rope_stretch[-1]),
        }
    return {
        "model_type": kind, "architectures": ["Qwen2ForCausalLM" if m.qkv_bias else "LlamaForCausalLM"],
        "hidden_size": m.d_model, "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.kv_heads, "intermediate_size": m.d_hidden,
        "max_position_embeddings": m.context_length, "hidden_act": _theirs(GATED, m.activation),
        "rms_norm_eps": m.norm_eps, "tie_word_embeddings": m.tie_embeddings, "vocab_size": m.vocab_size,
        # The same for readers of transformers 4 and of 5, which each know only their own keys.
        "rope_theta": m.rope_theta, "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": m.rope_theta, **(scaling or {"rope_type": "default"})},
    }  # fmt: skip


def _llama_entries(m: ModelConfig) -> Iterator[Entry]:
    yield Entry("model.embed_tokens.weight", ("embedding",), SAME)
    if not m.tie_embeddings:
        yield Entry("lm_head.weight", ("head",), linear())
    yield Entry("model.norm.weight", ("norm.scale",), SAME)
    layer = "model.layers.{i}."
    yield Entry(layer + "input_layernorm.weight", ("layers.attention_norm.scale",), SAME)
    yield Entry(layer + "post_attention_layernorm.weight", ("layers.mlp_norm.scale",), SAME)
    for x in "qkv":
        yield Entry(layer + f"self_attn.{x}_proj.weight", (f"layers.attention.w_{x}",), linear())
        if m.qkv_bias:
            yield Entry(layer + f"self_attn.{x}_proj.bias", (f"layers.attention.b_{x}",), FLAT)
    yield Entry(layer + "self_attn.o_proj.weight", ("layers.attention.w_o",), linear(2))
    for x in ("gate", "up", "down"):
        yield Entry(layer + f"mlp.{x}_proj.weight", (f"layers.mlp.w_{x}",), linear())


# --- GPT-2 ------------------------------------------------------------------------------------------------------------


# Other names that files give these keys.
ALIASES = {
    "n_embd": ("hidden_size",), "n_head": ("num_attention_heads",), "n_layer": ("num_hidden_layers",),
    "n_positions": ("max_position_embeddings", "n_ctx"),
}  # fmt: skip


def _gpt2_model(keys: Keys) -> Values:
    d, heads = (
        keys.whole("n_embd", also=ALIASES["n_embd"]),
        keys.whole("n_head", also=ALIASES["n_head"]),
    )
    keys.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        keys.only(key, False, None)
    return dict(
        task="language", stem="tokens", causal=True, vocab_size=keys.whole("vocab_size"), d_model=d,
        n_layers=keys.whole("n_layer", also=ALIASES["n_layer"]), n_heads=heads, n_kv_heads=heads,
        d_hidden=keys.whole("n_inner", 4 * d), activation=keys.name("activation_function", PLAIN),
        context_length=keys.whole("n_positions", also=ALIASES["n_positions"]), norm="layernorm",
        norm_eps=keys.number("layer_norm_epsilon"), qk_norm=False, position="learned", rope_scaling="", bias=True,
        qkv_bias=False, tie_embeddings=keys.flag("tie_word_embeddings", True), cutoffs="",
    )  # fmt: skip


def _gpt2_config(m: ModelConfig) -> Values:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": m.d_model, "n_layer": m.n_layers, "n_head": m.n_heads,
        "n_inner": m.d_hidden, "n_positions": m.context_length, "activation_function": _theirs(PLAIN, m.activation),
        "layer_norm_epsilon": m.norm_eps, "tie_word_embeddings": m.tie_embeddings, "vocab_size": m.vocab_size,
    }  # fmt: skip


def _gpt2_entries(m: ModelConfig) -> Iterator[Entry]:
    yield Entry("transformer.wte.weight", ("embedding",), SAME)
    yield Entry("transformer.wpe.weight", ("positions",), SAME)
    if not m.tie_embeddings:
        yield Entry("lm_head.weight", ("head",), linear())
    layer = "transformer.h.{i}."
    for theirs, ours in (
        ("transformer.ln_f", "norm"),
        (layer + "ln_1", "layers.attention_norm"),
        (layer + "ln_2", "layers.mlp_norm"),
    ):
        yield from _layer_norm(theirs, ours)
    qkv = "layers.attention.w_q", "layers.attention.w_k", "layers.attention.w_v"
    yield Entry(layer + "attn.c_attn.weight", qkv, kernel())
    yield Entry(layer + "attn.c_attn.bias", tuple(name.replace("w_", "b_") for name in qkv), FLAT)
    yield Entry(layer + "attn.c_proj.weight", ("layers.attention.w_o",), kernel(2))
    yield Entry(layer + "attn.c_proj.bias", ("layers.attention.bias_out",), FLAT)
    yield Entry(layer + "mlp.c_fc.weight", ("layers.mlp.w_up",), kernel())
    yield Entry(layer + "mlp.c_fc.bias", ("layers.mlp.b_up",), FLAT)
    yield Entry(layer + "mlp.c_proj.weight", ("layers.mlp.w_down",), kernel())
    yield Entry(layer + "mlp.c_proj.bias", ("layers.mlp.bias_out",), FLAT)


def _layer_norm(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(theirs + ".weight", (ours + ".scale",), SAME)
    yield Entry(theirs + ".bias", (ours + ".bias",), SAME)


# --- ViT --------------------------------------------------------------------------------------------------------------


def _vit_model(keys: Keys) -> Values:
    d, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    keys.only("qkv_bias", True)
    keys.get("tie_word_embeddings")  # there is nothing to tie
    size, patch = keys.whole("image_size"), keys.whole("patch_size")
    if size % patch:
        raise keys.wrong(
            "image_size", size, f"which patch_size={patch} does not divide; only whole squares work"
        )
    labels = keys.section("id2label")
    n_classes = keys.whole("num_labels", len(labels) if labels else 2)
    if labels and n_classes != len(labels):
        raise keys.wrong(
            "num_labels", n_classes, f"and {len(labels)} names in id2label; make them one"
        )
    return dict(
        task="classify", stem="image", causal=False, vocab_size=0, d_model=d, n_layers=keys.whole("num_hidden_layers"),
        n_heads=heads, n_kv_heads=heads, d_hidden=keys.whole("intermediate_size"), context_length=(size // patch) ** 2,
        activation=keys.name("hidden_act", PLAIN), norm="layernorm", norm_eps=keys.number("layer_norm_eps"),
        qk_norm=False, position="learned", rope_scaling="", bias=True, qkv_bias=False, cutoffs="",
        classifier=dict(n_classes=n_classes, pooling="cls", n_inputs=1, d_head=0),
        image=dict(height=size, width=size, channels=keys.whole("num_channels"), patch=patch),
    )  # fmt: skip


def _vit_config(m: ModelConfig) -> Values:
    labels = {str(i): f"LABEL_{i}" for i in range(m.classifier.n_classes)}
    return {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": m.d_model, "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads, "intermediate_size": m.d_hidden, "hidden_act": _theirs(PLAIN, m.activation),
        "layer_norm_eps": m.norm_eps, "image_size": m.image.height, "patch_size": m.image.patch, "num_channels": m.image.channels,
        "id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}, "qkv_bias": True,
    }  # fmt: skip


def _vit_entries(m: ModelConfig) -> Iterator[Entry]:
    yield Entry("vit.embeddings.cls_token", ("cls",), under(2))
    yield Entry("vit.embeddings.position_embeddings", ("positions",), under(1))
    yield Entry(
        "vit.embeddings.patch_embeddings.projection.weight",
        ("project.kernel",),
        pixels(m.image.patch, m.image.channels),
    )
    yield Entry("vit.embeddings.patch_embeddings.projection.bias", ("project.bias",), SAME)
    yield Entry("classifier.weight", ("classes.kernel",), linear())
    yield Entry("classifier.bias", ("classes.bias",), SAME)
    layer = "vit.encoder.layer.{i}."
    for theirs, ours in (
        ("vit.layernorm", "norm"), (layer + "layernorm_before", "layers.attention_norm"), (layer + "layernorm_after", "layers.mlp_norm")
    ):  # fmt: skip
        yield from _layer_norm(theirs, ours)
    for theirs, x in (("query", "q"), ("key", "k"), ("value", "v")):
        yield Entry(
            layer + f"attention.attention.{theirs}.weight", (f"layers.attention.w_{x}",), linear()
        )
        yield Entry(
            layer + f"attention.attention.{theirs}.bias", (f"layers.attention.b_{x}",), FLAT
        )
    yield Entry(layer + "attention.output.dense.weight", ("layers.attention.w_o",), linear(2))
    yield Entry(layer + "attention.output.dense.bias", ("layers.attention.bias_out",), SAME)
    yield Entry(layer + "intermediate.dense.weight", ("layers.mlp.w_up",), linear())
    yield Entry(layer + "intermediate.dense.bias", ("layers.mlp.b_up",), SAME)
    yield Entry(layer + "output.dense.weight", ("layers.mlp.w_down",), linear())
    yield Entry(layer + "output.dense.bias", ("layers.mlp.bias_out",), SAME)


# --- which ------------------------------------------------------------------------------------------------------------

LLAMA = Family("Llama, Mistral or Qwen2", _llama_model, _llama_config, _llama_entries)
GPT2 = Family("GPT-2", _gpt2_model, _gpt2_config, _gpt2_entries, prefix="transformer.")
VIT = Family("ViT", _vit_model, _vit_config, _vit_entries)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "gpt2": GPT2,
    "vit": VIT,
}  # by model_type
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaModel"), "mistral": ("MistralForCausalLM", "MistralModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"), "vit": ("ViTForImageClassification", "ViTModel"),
}  # fmt: skip


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError where it is of none."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"config.json has model_type={kind!r}; models of the types {', '.join(FAMILIES)} can be imported"
        )
    return FAMILIES[kind]


def model_of(family: Family, theirs: Mapping[str, Any]) -> Values:
    """Our `model` section of a config.json.

    Raises:
      UserError: a key has a value that has no block here, or is not known.
    """
    keys = Keys("config.json", theirs)
    model = family.model(keys)
    known = ARCHITECTURES[theirs["model_type"]]
    named = keys.get("architectures") or []
    if not isinstance(named, list) or not all(
        str(name).lower() in map(str.lower, known) for name in named
    ):
        raise keys.wrong(
            "architectures", named, f"for which there is no block here ({', '.join(known)} work)"
        )
    keys.close(IGNORED | GENERATION.keys(), DEFAULTS)
    return model


def family_for(m: ModelConfig) -> tuple[Family, Values]:
    """(the family whose layout has the dense model of these sizes, its config.json).

    Raises:
      UserError: there is none.
    """
    family = VIT if m.stem == "image" else GPT2 if m.norm == "layernorm" else LLAMA
    theirs = family.config(m)
    try:
        back = model_of(family, theirs)
    except UserError:  # only an activation that the family has no name for is not read back
        back = {"activation": None}
    wrong = _first_difference(to_dict(m) | {"n_kv_heads": m.kv_heads}, back, "config.model.")
    if wrong is None:
        return family, theirs
    key, value, wanted = wrong
    has = "another" if wanted is None else repr(wanted)
    remedy = "so no model of Hugging Face's own loads these weights; export with --routed, or with --format=safetensors"
    raise UserError(f"{key}={value!r}: the layout of {family.kind} has {has}, {remedy}")


def _first_difference(
    own: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str
) -> tuple[str, Any, Any] | None:
    for key, wanted in theirs.items():
        if isinstance(wanted, Mapping):
            found = _first_difference(own[key], wanted, f"{prefix}{key}.")
            if found:
                return found
        elif own[key] != wanted:
            return f"{prefix}{key}", own[key], wanted
    return None
