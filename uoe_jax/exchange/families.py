"""Families of dense models in Hugging Face's layout, read in both directions; no jax is imported.

A family maps a config.json to our `model` section and back. Our model is of a family exactly where
mapping it to a config.json and back gives the same model. Layouts: the `modeling_*.py` files of
`transformers` 5.24.
"""

from typing import Any, Iterator, Mapping

from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import ModelConfig
from uoe_jax.errors import UserError
from uoe_jax.exchange.config_keys import DEFAULTS, GENERATION, IGNORED, Keys
from uoe_jax.exchange.layouts import (
    FLAT,
    GATED,
    PLAIN,
    Entry,
    Family,
    Values,
    activation_name,
    affine,
    entry,
    kernel,
    layer_norm,
    linear,
    pixels,
    read_sizes,
    under,
    write_sizes,
)

# --- Llama, Mistral, Qwen2 -----------------------------------------------------------------------

LLAMA_SIZES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "d_hidden",
    "vocab_size": "vocab_size",
}
LENGTH = "original_max_position_embeddings"
SCALING = ("factor", "low_freq_factor", "high_freq_factor", LENGTH)  # of llama3
THETA, MISTRAL_WINDOW = 10000.0, 4096  # of their classes, where config.json has none


def _llama_model(keys: Keys) -> Values:
    kind, sizes = keys.get("model_type"), read_sizes(keys, LLAMA_SIZES)
    heads = sizes["n_heads"]
    keys.only("head_dim", None, sizes["d_model"] // heads)
    keys.only("attention_bias", False, None, *[True] * (kind == "qwen2"))
    for key in ("mlp_bias", "use_sliding_window"):
        keys.only(key, False, None)
    kinds = keys.get("layer_types") or []
    if not isinstance(kinds, list) or any(name != "full_attention" for name in kinds):
        why = "for which there is no block here (full_attention works)"
        raise keys.wrong("layer_types", kinds, why)
    context = keys.whole("max_position_embeddings")
    kv_heads = keys.whole("num_key_value_heads", heads)
    if kind == "mistral":
        default = context if "sliding_window" in keys else MISTRAL_WINDOW
        context = min(context, keys.whole("sliding_window", default))
        kv_heads = kv_heads if "num_key_value_heads" in keys else 8
    elif kind == "qwen2":
        keys.get("sliding_window")  # use_sliding_window turns it off
    theta, scaling = _rope(keys)
    return dict(
        activation=keys.name("hidden_act", GATED),
        n_kv_heads=kv_heads,
        context_length=context,
        norm_eps=keys.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2",
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        **sizes,
        **dict(task="language", stem="tokens", causal=True, cutoffs=""),
        **dict(norm="rmsnorm", qk_norm=False, position="rope", bias=False),
    )


def _rope(keys: Keys) -> tuple[float, str]:
    """(theta, `model.rope_scaling`).

    transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`.

    Raises:
      UserError: both are there and differ, or there is no code for the kind of frequencies.
    """
    theta, length = keys.number("rope_theta", None), keys.number(LENGTH, None)
    sections = (keys.section(name) for name in ("rope_parameters", "rope_scaling"))
    found = {_rope_section(section, theta, length) for section in sections if section}
    if len(found) > 1:
        both = "rope_parameters and rope_scaling that differ"
        raise UserError(f"{keys.file} has {both}; make them one")
    return found.pop() if found else (theta or THETA, "")


def _rope_section(keys: Keys, theta: float | None, top: float | None) -> tuple[float, str]:
    name = "rope_type" if keys.has("rope_type") else "type"
    kind = keys.only(name, "default", "llama3", None) or "default"
    if (keys.get("type") or kind) != kind:
        raise keys.wrong("rope_type", kind, f"and type={keys.get('type')!r}; make them one")
    own = keys.number("rope_theta", None)
    if None not in (own, theta) and own != theta:
        why = f"and config.json itself has rope_theta={theta}; make them one"
        raise keys.wrong("rope_theta", own, why)
    numbers: list[float] = []
    if kind == "llama3":
        length = keys.number(LENGTH, top)
        if length is None:
            raise UserError(f"{keys.file} has no {LENGTH}, which llama3 takes; give it")
        if not length.is_integer():
            raise keys.wrong(LENGTH, length, "give a whole number")
        if (top or length) != length:
            raise keys.wrong(LENGTH, length, f"and config.json itself has {top}; make them one")
        numbers = [*(keys.number(name) for name in SCALING[:3]), length]
    keys.close(frozenset(), dict.fromkeys(("partial_rotary_factor", "factor"), (1,)))
    return own or theta or THETA, ",".join(f"{number:.12g}" for number in numbers)


def _llama_config(m: ModelConfig) -> Values:
    scaling: Values | None = None
    if m.rope_stretch:
        scaling = {"rope_type": "llama3", **dict(zip(SCALING, m.rope_stretch))}
        scaling[LENGTH] = int(m.rope_stretch[-1])
    return {
        "model_type": "qwen2" if m.qkv_bias else "llama",
        "architectures": ["Qwen2ForCausalLM" if m.qkv_bias else "LlamaForCausalLM"],
        **write_sizes(m, LLAMA_SIZES),
        "num_key_value_heads": m.kv_heads,
        "max_position_embeddings": m.context_length,
        "hidden_act": activation_name(GATED, m.activation),
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
        # The same for transformers 4 and for 5, which each read only their own keys.
        "rope_theta": m.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": m.rope_theta, **(scaling or {"rope_type": "default"})},
    }


def _llama_entries(m: ModelConfig) -> Iterator[Entry]:
    yield entry("model.embed_tokens.weight", "embedding")
    if not m.tie_embeddings:
        yield entry("lm_head.weight", "head", linear())
    yield entry("model.norm.weight", "norm.scale")
    layer = "model.layers.{i}."
    yield entry(layer + "input_layernorm.weight", "layers.attention_norm.scale")
    yield entry(layer + "post_attention_layernorm.weight", "layers.mlp_norm.scale")
    for x in "qkv":
        yield entry(layer + f"self_attn.{x}_proj.weight", f"layers.attention.w_{x}", linear())
        if m.qkv_bias:
            yield entry(layer + f"self_attn.{x}_proj.bias", f"layers.attention.b_{x}", FLAT)
    yield entry(layer + "self_attn.o_proj.weight", "layers.attention.w_o", linear(2))
    for x in ("gate", "up", "down"):
        yield entry(layer + f"mlp.{x}_proj.weight", f"layers.mlp.w_{x}", linear())


_LLAMA_NEEDS = "norm='rmsnorm', position='rope', activation='swiglu' and bias=False"
_LLAMA_NEEDS += " (Llama, as in --config=uoe_1b)"
LLAMA = Family("Llama, Mistral or Qwen2", _llama_model, _llama_config, _llama_entries, _LLAMA_NEEDS)


# --- GPT-2 ---------------------------------------------------------------------------------------

_GPT2_SIZES = {
    "n_embd": "d_model",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
}


def _gpt2_model(keys: Keys) -> Values:
    keys.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        keys.only(key, False, None)
    sizes = read_sizes(keys, _GPT2_SIZES)
    return dict(
        activation=keys.name("activation_function", PLAIN),
        n_kv_heads=sizes["n_heads"],
        d_hidden=keys.whole("n_inner", 4 * sizes["d_model"]),
        norm_eps=keys.number("layer_norm_epsilon"),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        **sizes,
        **dict(task="language", stem="tokens", causal=True, norm="layernorm", qk_norm=False),
        **dict(position="learned", rope_scaling="", bias=True, qkv_bias=False, cutoffs=""),
    )


def _gpt2_config(m: ModelConfig) -> Values:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **write_sizes(m, _GPT2_SIZES),
        "n_inner": m.d_hidden,
        "activation_function": activation_name(PLAIN, m.activation),
        "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
    }


def _gpt2_entries(m: ModelConfig) -> Iterator[Entry]:
    yield entry("transformer.wte.weight", "embedding")
    yield entry("transformer.wpe.weight", "positions")
    if not m.tie_embeddings:
        yield entry("lm_head.weight", "head", linear())
    layer, heads, mlp = "transformer.h.{i}.", "layers.attention.", "layers.mlp."
    yield from layer_norm("transformer.ln_f", "norm")
    yield from layer_norm(layer + "ln_1", "layers.attention_norm")
    yield from layer_norm(layer + "ln_2", "layers.mlp_norm")
    for kind, form, x in (("weight", kernel(), "w"), ("bias", FLAT, "b")):
        yield Entry(f"{layer}attn.c_attn.{kind}", tuple(f"{heads}{x}_{y}" for y in "qkv"), form)
    yield from affine(layer + "attn.c_proj", kernel(2), heads + "w_o", heads + "bias_out")
    yield from affine(layer + "mlp.c_fc", kernel(), mlp + "w_up", mlp + "b_up")
    yield from affine(layer + "mlp.c_proj", kernel(), mlp + "w_down", mlp + "bias_out")


_PLAIN_NEEDS = "norm='layernorm', position='learned', activation='gelu', bias=True"
_NEEDS = f"{_PLAIN_NEEDS} (GPT-2)"
GPT2 = Family("GPT-2", _gpt2_model, _gpt2_config, _gpt2_entries, _NEEDS, "transformer.")


# --- ViT -----------------------------------------------------------------------------------------

_VIT_SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_hidden",
}


def _vit_model(keys: Keys) -> Values:
    sizes = read_sizes(keys, _VIT_SIZES)
    keys.only("qkv_bias", True)
    keys.get("tie_word_embeddings")  # there is nothing to tie
    size, patch = keys.whole("image_size"), keys.whole("patch_size")
    if size % patch:
        why = f"which patch_size={patch} does not divide; only whole squares work"
        raise keys.wrong("image_size", size, why)
    labels = keys.section("id2label")
    n_labels = len(labels) if labels else 0
    n_classes = keys.whole("num_labels", n_labels or 2)
    if labels and n_classes != n_labels:
        why = f"and {n_labels} names in id2label; make them one"
        raise keys.wrong("num_labels", n_classes, why)
    return dict(
        activation=keys.name("hidden_act", PLAIN),
        n_kv_heads=sizes["n_heads"],
        context_length=(size // patch) ** 2,
        norm_eps=keys.number("layer_norm_eps"),
        **sizes,
        **dict(task="classify", stem="image", causal=False, vocab_size=0, cutoffs=""),
        **dict(norm="layernorm", qk_norm=False, position="learned", rope_scaling=""),
        **dict(bias=True, qkv_bias=False),
        classifier=dict(n_classes=n_classes, pooling="cls", n_inputs=1, d_head=0),
        image=dict(height=size, width=size, channels=keys.whole("num_channels"), patch=patch),
    )


def _vit_config(m: ModelConfig) -> Values:
    labels = {str(i): f"LABEL_{i}" for i in range(m.classifier.n_classes)}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        **write_sizes(m, _VIT_SIZES),
        "hidden_act": activation_name(PLAIN, m.activation),
        "layer_norm_eps": m.norm_eps,
        "image_size": m.image.height,
        "patch_size": m.image.patch,
        "num_channels": m.image.channels,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
        "qkv_bias": True,
    }


def _vit_entries(m: ModelConfig) -> Iterator[Entry]:
    stem, layer = "vit.embeddings.", "vit.encoder.layer.{i}."
    heads, mlp = "layers.attention.", "layers.mlp."
    yield entry(stem + "cls_token", "cls", under(2))
    yield entry(stem + "position_embeddings", "positions", under(1))
    squares = pixels(m.image.patch, m.image.channels)
    projection = stem + "patch_embeddings.projection"
    yield from affine(projection, squares, "project.kernel", "project.bias")
    yield from affine("classifier", linear(), "classes.kernel", "classes.bias")
    yield from layer_norm("vit.layernorm", "norm")
    yield from layer_norm(layer + "layernorm_before", "layers.attention_norm")
    yield from layer_norm(layer + "layernorm_after", "layers.mlp_norm")
    for theirs, x in (("query", "q"), ("key", "k"), ("value", "v")):
        name = f"{layer}attention.attention.{theirs}"
        yield from affine(name, linear(), f"{heads}w_{x}", f"{heads}b_{x}")
    out = layer + "attention.output.dense"
    yield from affine(out, linear(2), heads + "w_o", heads + "bias_out")
    yield from affine(layer + "intermediate.dense", linear(), mlp + "w_up", mlp + "b_up")
    yield from affine(layer + "output.dense", linear(), mlp + "w_down", mlp + "bias_out")


VIT = Family(
    "ViT", _vit_model, _vit_config, _vit_entries, f"{_PLAIN_NEEDS}, classifier.pooling='cls' (ViT)"
)


# --- which ---------------------------------------------------------------------------------------

FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "gpt2": GPT2, "vit": VIT}
ARCHITECTURES = {  # by model_type
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Model"),
    "vit": ("ViTForImageClassification", "ViTModel"),
}


def family_of(theirs: Mapping[str, Any]) -> Family:
    """The family of a config.json; UserError where it is of none."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        remedy = f"models of the types {', '.join(FAMILIES)} can be imported"
        raise UserError(f"config.json has model_type={kind!r}; {remedy}")
    return FAMILIES[kind]


def model_of(family: Family, theirs: Mapping[str, Any]) -> Values:
    """Our `model` section of a config.json.

    Raises:
      UserError: a key has a value that has no block here, or is not known.
    """
    keys = Keys("config.json", theirs)
    model = family.model(keys)
    known, named = ARCHITECTURES[theirs["model_type"]], keys.get("architectures") or []
    lower = [name.lower() for name in known]
    if not isinstance(named, list) or any(str(name).lower() not in lower for name in named):
        why = f"for which there is no block here ({', '.join(known)} work)"
        raise keys.wrong("architectures", named, why)
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
    except UserError:  # only an activation without a name in the family is not read back
        back = {"activation": None}
    wrong = _first_difference(to_dict(m) | {"n_kv_heads": m.kv_heads}, back, "config.model.")
    if wrong is None:
        return family, theirs
    key, value, wanted = wrong
    has = "another" if wanted is None else repr(wanted)
    why = f"the layout of {family.kind} has {has}, so no model of Hugging Face's own loads these"
    fitting = () if m.task == "classify" else (LLAMA, GPT2)
    needs = " or ".join(f.needs for f in ((VIT,) if m.stem == "image" else fitting))
    train = f", or train with {needs}" if needs else ""
    routed = "--routed, or with " if m.task == "language" else ""
    remedy = f"export with {routed}--format=safetensors{train}"
    raise UserError(f"{key}={value!r}: {why} weights; {remedy}")


def _first_difference(
    own: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str
) -> tuple[str, Any, Any] | None:
    for key, wanted in theirs.items():
        if isinstance(wanted, Mapping):
            if found := _first_difference(own[key], wanted, f"{prefix}{key}."):
                return found
        elif own[key] != wanted:
            return f"{prefix}{key}", own[key], wanted
    return None
