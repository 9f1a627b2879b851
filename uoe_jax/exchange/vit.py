"""ViT classifiers in Hugging Face's layout (`modeling_vit.py` of `transformers` 5.24)."""

from __future__ import annotations

from typing import Iterator

from uoe_jax.config.schema import ModelConfig
from uoe_jax.exchange.config_keys import Keys
from uoe_jax.exchange.layouts import (
    PLAIN,
    Entry,
    Family,
    Values,
    activation_name,
    affine,
    entry,
    layer_norm,
    linear,
    pixels,
    read_sizes,
    under,
    write_sizes,
)

SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "d_hidden",
}


def _model(keys: Keys) -> Values:
    sizes = read_sizes(keys, SIZES)
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


def _config(m: ModelConfig) -> Values:
    labels = {str(i): f"LABEL_{i}" for i in range(m.classifier.n_classes)}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        **write_sizes(m, SIZES),
        "hidden_act": activation_name(PLAIN, m.activation),
        "layer_norm_eps": m.norm_eps,
        "image_size": m.image.height,
        "patch_size": m.image.patch,
        "num_channels": m.image.channels,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
        "qkv_bias": True,
    }


def _entries(m: ModelConfig) -> Iterator[Entry]:
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


_NEEDS = (
    "norm='layernorm', position='learned', activation='gelu', 'gelu_tanh' or 'relu', bias=True "
    "and classifier.pooling='cls' (ViT)"
)
VIT = Family("ViT", _model, _config, _entries, _NEEDS)
