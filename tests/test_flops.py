"""The counted operations against the compiler's own count of the compiled forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from small_models import compilers_count

from uoe_jax import RoutingConfig
from uoe_jax.config import ClassifierConfig, ImageConfig, ModelConfig
from uoe_jax.costs.flops import forward_flops, train_flops
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.decoder import Transformer

# One layer: the compiler counts the body of the scan over layers once. Wide, so that elementwise work is small beside it.
BASE = ModelConfig(
    vocab_size=256, d_model=512, n_layers=1, n_heads=8, d_hidden=2048, context_length=128
)
R = RoutingConfig(n_experts=8, k=4, capacity_window=32)
HIERARCHICAL = dataclasses.replace(R, unit="hierarchical", priority="score", capacity_factor=0.5)
BOUND = dict(sequence_capacity_factor=1.0, sequence_group=4)
MODELS = {
    "dense, dense": dataclasses.replace(BASE, attention="dense", mlp="dense", remat="none"),
    "smha, uome": dataclasses.replace(BASE, smha=R, uome=R, remat="none"),
    "smha P=4, swiglu": dataclasses.replace(
        BASE, activation="swiglu", smha=dataclasses.replace(R, patch_size=4, capacity_factor=1.5), uome=dataclasses.replace(R, k=2)
    ),
    "project, then gather": dataclasses.replace(
        BASE, activation="geglu", smha=dataclasses.replace(R, order="project"), uome=dataclasses.replace(R, order="project")
    ),
    "grouped": dataclasses.replace(BASE, attention="dense", n_kv_heads=2, uome=dataclasses.replace(R, capacity_factor=0.5)),
    "by sequences": dataclasses.replace(BASE, causal=False, smha=dataclasses.replace(R, unit="sequence"), uome=HIERARCHICAL),
    "bounded sequences": dataclasses.replace(
        BASE, causal=False, uome=dataclasses.replace(HIERARCHICAL, **BOUND),
        smha=dataclasses.replace(R, unit="sequence", priority="score", order="project", **BOUND),
    ),
}  # fmt: skip
IMAGE = ImageConfig(height=32, width=64, channels=3, patch=4)
CLASSIFIERS = {
    "one input": dataclasses.replace(MODELS["smha, uome"], task="classify"),
    "two images, cls, last patch not full": dataclasses.replace(
        MODELS["smha P=4, swiglu"], task="classify", causal=False, stem="image", image=IMAGE,
        classifier=ClassifierConfig(n_inputs=2, d_head=512, pooling="cls"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_the_compilers(name):
    config = MODELS[name]
    training = "bounded" in name
    rows = 4 if training else 1
    tokens = jax.ShapeDtypeStruct((rows, config.context_length), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)) if training else None
    counted = compilers_count(Transformer, config, tokens, keys_B=keys)
    assert counted == pytest.approx(rows * forward_flops(config, training=training), rel=0.05)
    if training:
        assert train_flops(config, rows) < 0.8 * 3 * rows * forward_flops(config)


def test_stem_and_head_alone():
    """The ends of a model are too small to show in its total: the difference of two models."""
    few = CLASSIFIERS["two images, cls, last patch not full"]
    wide = dataclasses.replace(few, classifier=dataclasses.replace(few.classifier, d_head=4096))
    deep = dataclasses.replace(few, image=dataclasses.replace(few.image, channels=300))

    def counted(c: ModelConfig) -> float:
        i = c.image
        return compilers_count(
            Classifier, c, jax.ShapeDtypeStruct((1, 2, i.height, i.width, i.channels), jnp.float32)
        )

    for other in (wide, deep):
        assert counted(other) - counted(few) == pytest.approx(
            forward_flops(other) - forward_flops(few), rel=0.05
        )


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name):
    config = CLASSIFIERS[name]
    i, shape = config.image, (3, config.context_length)
    inputs = (
        jax.ShapeDtypeStruct((3, 2, i.height, i.width, i.channels), jnp.float32)
        if config.stem == "image"
        else jax.ShapeDtypeStruct(shape, jnp.int32)
    )
    assert compilers_count(Classifier, config, inputs) == pytest.approx(
        3 * forward_flops(config), rel=0.05
    )


def test_flops_scale():
    config = MODELS["smha, uome"]
    two = dataclasses.replace(config, n_layers=2)
    head = 2 * 128 * 512 * 256
    assert forward_flops(two) - head == 2 * (forward_flops(config) - head)
    assert train_flops(config, 5) == 15 * forward_flops(config)
