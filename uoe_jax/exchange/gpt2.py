"""GPT-2 in Hugging Face's layout (`modeling_gpt2.py` of `transformers` 5.24)."""

from __future__ import annotations

from typing import Iterator

from uoe_jax.config.schema import ModelConfig
from uoe_jax.exchange.config_keys import Keys
from uoe_jax.exchange.layouts import (
    FLAT,
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
    read_sizes,
    write_sizes,
)

SIZES = {
    "n_embd": "d_model",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "n_positions": "context_length",
    "vocab_size": "vocab_size",
}


def _model(keys: Keys) -> Values:
    keys.only("scale_attn_weights", True)
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        keys.only(key, False, None)
    sizes = read_sizes(keys, SIZES)
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


def _config(m: ModelConfig) -> Values:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **write_sizes(m, SIZES),
        "n_inner": m.d_hidden,
        "activation_function": activation_name(PLAIN, m.activation),
        "layer_norm_epsilon": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
    }


def _entries(m: ModelConfig) -> Iterator[Entry]:
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


_NEEDS = (
    "norm='layernorm', position='learned', activation='gelu', 'gelu_tanh' or 'relu' and bias=True "
    "(GPT-2)"
)
GPT2 = Family("GPT-2", _model, _config, _entries, _NEEDS, prefix="transformer.")
