"""The counted operations against the compiler's own count of the compiled forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from uoe_jax import RoutingConfig
from uoe_jax.config import ModelConfig
from uoe_jax.flops import forward_flops, train_flops
from uoe_jax.model import Transformer

# One layer: the compiler counts the body of the scan over layers once. Wide, so that elementwise work is small beside it.
BASE = ModelConfig(vocab_size=256, d_model=512, n_layers=1, n_heads=8, d_hidden=2048, context_length=128)
R = RoutingConfig(n_experts=8, k=4, capacity_window=32)
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
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_flops_are_the_compilers(name):
    config = MODELS[name]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens)[0]).lower(state, tokens).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(forward_flops(config), rel=0.05)


def test_flops_scale():
    config = MODELS["smha, uome"]
    two = dataclasses.replace(config, n_layers=2)
    head = 2 * 128 * 512 * 256
    assert forward_flops(two) - head == 2 * (forward_flops(config) - head)
    assert train_flops(config, 5) == 15 * forward_flops(config)
