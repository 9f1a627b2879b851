"""The counted bytes against the arrays themselves and against the compiler's own count."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import slow
from small_classifiers import CLASSIFIERS, classifier_config

from uoe_jax import RoutingConfig
from uoe_jax.config import MeshConfig, ModelConfig
from uoe_jax.costs.memory import cache_bytes, kept_bytes
from uoe_jax.distributed.mesh import make_mesh, weight_sharding
from uoe_jax.models import count
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.decoder import Transformer

BASE = ModelConfig(
    vocab_size=64, d_model=64, n_layers=2, n_heads=8, d_hidden=256, context_length=64
)
R = RoutingConfig(n_experts=8, k=4, capacity_window=32)
ROWS = 8
MODELS = {
    "smha, uome": dataclasses.replace(BASE, smha=R, uome=R),
    "dense, dense": dataclasses.replace(BASE, attention="dense", mlp="dense"),
    "swiglu, grouped, biases": dataclasses.replace(
        BASE, activation="swiglu", n_kv_heads=4, bias=True, norm="layernorm", position="learned", tie_embeddings=False,
        smha=dataclasses.replace(R, n_experts=4, k=1, router_bias=True), uome=dataclasses.replace(R, patch_size=4, capacity_factor=1.5, bias_rate=0.1),
    ),
    "biases of queries, keys and values": dataclasses.replace(BASE, qkv_bias=True, n_kv_heads=4, smha=dataclasses.replace(R, n_experts=4, k=2), uome=R),
    "project": dataclasses.replace(BASE, smha=dataclasses.replace(R, order="project"), uome=dataclasses.replace(R, order="project")),
    "scatter": dataclasses.replace(
        BASE, smha=dataclasses.replace(R, dispatch="scatter"), uome=dataclasses.replace(R, dispatch="scatter")
    ),
    "bfloat16": dataclasses.replace(BASE, dtype="bfloat16", smha=R, uome=R),
    "whole blocks again": dataclasses.replace(BASE, remat="block", smha=R, uome=R),
    "by sequences, bounded": dataclasses.replace(
        BASE, causal=False, smha=dataclasses.replace(R, unit="sequence", sequence_capacity_factor=1.0),
        uome=dataclasses.replace(R, unit="hierarchical", priority="score", capacity_factor=0.5, sequence_capacity_factor=1.0),
    ),
}  # fmt: skip


def test_parameters_of_a_model_known_by_hand():
    c = MODELS["dense, dense"]
    layer = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 64
    assert count.layer_parameters(c) == layer
    assert count.vocabulary_parameters(c) == 64 * 64
    assert count.parameters(c) == 2 * layer + 64 * 64 + 64
    assert count.classifier_parameters(c) == 0
    untied = dataclasses.replace(c, tie_embeddings=False, position="learned")
    assert count.parameters(untied) - count.parameters(c) == 64 * 64 + c.context_length * 64


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_its_own_beside_those_of_the_layers(name):
    c = classifier_config(name)
    model = Classifier(c, rngs=nnx.Rngs(0))
    shared = jax.tree.leaves((model.embedding, model.positions, model.layers, model.norm))
    own = count.parameters(c) - sum(a.size for a in shared)
    assert count.classifier_parameters(c) == own > 0


def test_parameters_of_a_device_are_those_of_its_shards():
    c, shape = MODELS["swiglu, grouped, biases"], dict(replica=1, data=1, fsdp=4, expert=2)
    mesh, held = make_mesh(MeshConfig(**shape)), 0
    for w in count.abstract_weights(c).values():
        sharding = weight_sharding(mesh, w.logical_axes, w.shape)
        held += math.prod(sharding.shard_shape(w.shape))
    assert count.parameters_per_device(c, shape) == held < count.parameters(c) / 4


def abstract(config: ModelConfig):
    """(graphdef, state, tokens, keys) of 8 rows, as shapes."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    return graphdef, state, jax.ShapeDtypeStruct((ROWS, config.context_length), jnp.int32), keys


@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_keeps_is_what_the_gradient_is_given(name):
    """Without a compiler: the values handed from the forward to the backward pass, the weights themselves left out."""

    def handed(n_layers: int) -> int:
        config = dataclasses.replace(MODELS[name], n_layers=n_layers)
        graphdef, state, tokens, keys = abstract(config)

        def forward(state, tokens, keys):
            return jax.vjp(
                lambda state: nnx.merge(graphdef, state)(tokens, keys_B=keys)[0].mean(), state
            )[1]

        kept = jax.eval_shape(forward, state, tokens, keys)
        weights = sum(4 * a.size for a in jax.tree.leaves(state))
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)) - weights

    assert kept_bytes(MODELS[name], ROWS) == pytest.approx((handed(6) - handed(2)) / 4, rel=0.01)


QUICK = ("smha, uome", "dense, dense", "whole blocks again")


# Not bfloat16, whose products the CPU compiler does in float32.
@pytest.mark.parametrize(
    "name", [name if name in QUICK else slow(name) for name in MODELS if name != "bfloat16"]
)
def test_what_a_layer_keeps_is_the_compilers(name):
    """The temporary memory of the gradient grows by `kept_bytes` with every layer."""

    def temporary(n_layers: int) -> int:
        config = dataclasses.replace(MODELS[name], n_layers=n_layers)
        graphdef, state, tokens, keys = abstract(config)

        def loss(state, tokens, keys):
            return nnx.merge(graphdef, state)(tokens, keys_B=keys)[0].mean()

        return (
            jax.jit(jax.grad(loss))
            .lower(state, tokens, keys)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    few, many = 8, 24
    grown = (temporary(many) - temporary(few)) / (many - few)
    assert kept_bytes(MODELS[name], ROWS) == pytest.approx(grown, rel=0.05)


def test_only_named_policies_are_counted():
    with pytest.raises(ValueError, match="remat='dots'"):
        kept_bytes(dataclasses.replace(BASE, remat="dots"), 1)


@pytest.mark.parametrize(
    "name", ["smha, uome", "dense, dense", "swiglu, grouped, biases", "bfloat16"]
)
def test_a_cache_is_as_large_as_counted(name):
    config = MODELS[name]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def prefill(state, *args):
        return nnx.merge(graphdef, state).prefill(*args, config.context_length)[1]

    cache = jax.eval_shape(
        prefill,
        state,
        jax.ShapeDtypeStruct((3, 16), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    held = sum(
        a.size * a.dtype.itemsize
        for a in (a for layer in cache.attention for a in (layer.k, layer.v))
    )
    assert held == cache_bytes(config, rows=3)
    if config.attention == "smha":  # K/N of a dense cache, or as much as the capacity leaves
        share = config.smha.slot_tokens(64) / 64
        assert held == pytest.approx(share * cache_bytes(config, rows=3, dense=True)) and share < 1
