"""Experts on the mesh: the same numbers on every factorisation of 8 devices, and one reduction over `expert` per block."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_model import MODEL, batch

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax import mesh as mesh_lib
from uoe_jax.config import MeshConfig, from_dict
from uoe_jax.errors import ConfigError
from uoe_jax.layers.common import tokens_like
from uoe_jax.train.step import build

ROUTING = dict(n_experts=8, k=4, capacity_window=16, bias_rate=0.01)
SHAPES = [(d, f, e) for d, f, e in itertools.product((1, 2, 4, 8), repeat=3) if d * f * e == 8]


def run(sizes: dict, steps: int, **model) -> tuple[dict, np.ndarray]:
    """(initial parameters on the host, losses and gradient norms) of a small quickstart."""
    model = {**MODEL, "n_heads": 8, "smha": ROUTING, "uome": ROUTING}
    config = from_dict({"model": model, "train": {"batch_size": 8}, "mesh": sizes})
    n = int(np.prod([sizes.get(a, 1) for a in mesh_lib.AXES]))
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:n])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state, rows, found = program.init(jax.random.key(0)), mesh_lib.put_batch(mesh, batch(rows=8)), []
        first = jax.device_get(state.params)
        for _ in range(steps):
            state, metrics = program.train_step(state, rows)
            found += [float(metrics["sums"].nll), float(metrics["grad_norm"])]
    return first, np.array(found)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("replica, data, fsdp, expert", [(2, 1, 2, 2), *(slow(1, *shape) for shape in SHAPES)])
def test_every_mesh_gives_the_same_run(replica, data, fsdp, expert):
    one_params, one = run(dict(data=1), 20)
    params, found = run(dict(replica=replica, data=data, fsdp=fsdp, expert=expert), 20)
    for a, b in zip(jax.tree.leaves(one_params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(found, one, rtol=1e-5)


def collectives(text: str) -> list[tuple[str, str]]:
    """(kind, result shape) of every collective in compiled HLO."""
    found = re.findall(r"= (\S+?)(?:\{[^}]*\})? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return [(kind, shape) for shape, kind in found]


@pytest.mark.parametrize("kind", ["uome", "smha"])
@pytest.mark.parametrize("data, fsdp, expert", [(2, 1, 4), (1, 2, 4), (2, 2, 2), (1, 1, 8)])
def test_one_reduction_over_expert(kind, data, fsdp, expert):
    """In the forward pass: one all-reduce of a device's activations, all-gathers of weights, and sums of counts."""
    d, l, b = 32, 16, 8
    routing = RoutingConfig(n_experts=8, k=4, capacity_window=8)
    make = (lambda: UoME(d, 64, routing, rngs=nnx.Rngs(0))) if kind == "uome" else (lambda: SMHA(d, 8, routing, rngs=nnx.Rngs(0)))
    mesh = mesh_lib.make_mesh(MeshConfig(data=data, fsdp=fsdp, expert=expert))
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(make())
        x = jax.device_put(jnp.ones((b, l, d)), mesh_lib.batch_sharding(mesh))
        f = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, tokens_like(x))[0])
        found = collectives(f.lower(state, x).compile().as_text())
    activation = f"f32[{b // (data * fsdp)},{l},{d}]"
    assert [k for k, shape in found if shape == activation] == ["all-reduce"], found
    assert not [k for k, _ in found if k in ("all-to-all", "collective-permute", "reduce-scatter")], found


def test_experts_that_do_not_fit_the_axis_are_refused():
    config = from_dict({"model": {**MODEL, "uome": {**ROUTING, "n_experts": 6}, "d_hidden": 96}, "mesh": {"expert": 4, "data": 2}})
    with pytest.raises(ConfigError, match="config.model.uome.n_experts=6: must be a multiple of mesh.expert=4"):
        build(config, mesh_lib.make_mesh(config.mesh))
