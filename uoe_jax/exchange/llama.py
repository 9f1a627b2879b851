"""Llama, Mistral and Qwen2 in Hugging Face's layout (`modeling_*.py` of `transformers` 5.24)."""

from __future__ import annotations

from typing import Iterator

from uoe_jax.config.schema import ModelConfig
from uoe_jax.errors import UserError
from uoe_jax.exchange.config_keys import Keys
from uoe_jax.exchange.layouts import (
    FLAT,
    GATED,
    Entry,
    Family,
    Values,
    activation_name,
    entry,
    linear,
    read_sizes,
    write_sizes,
)

SIZES = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "d_hidden",
    "vocab_size": "vocab_size",
}
LENGTH = "original_max_position_embeddings"
SCALING = ("factor", "low_freq_factor", "high_freq_factor", LENGTH)  # of llama3
THETA, MISTRAL_WINDOW = 10000.0, 4096  # of their classes, where config.json has none


def _model(keys: Keys) -> Values:
    kind, sizes = keys.get("model_type"), read_sizes(keys, SIZES)
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


def _config(m: ModelConfig) -> Values:
    scaling: Values | None = None
    if m.rope_stretch:
        scaling = {"rope_type": "llama3", **dict(zip(SCALING, m.rope_stretch))}
        scaling[LENGTH] = int(m.rope_stretch[-1])
    return {
        "model_type": "qwen2" if m.qkv_bias else "llama",
        "architectures": ["Qwen2ForCausalLM" if m.qkv_bias else "LlamaForCausalLM"],
        **write_sizes(m, SIZES),
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


def _entries(m: ModelConfig) -> Iterator[Entry]:
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


_NEEDS = (
    "norm='rmsnorm', position='rope', activation='swiglu' or 'geglu' and bias=False "
    "(Llama, as in --config=uoe_1b)"
)
LLAMA = Family("Llama, Mistral or Qwen2", _model, _config, _entries, _NEEDS)
