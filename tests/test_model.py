"""The whole model: compile time does not grow with depth, every dtype and remat policy computes the same."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import slow
from small_models import MODEL, batch, program

from uoe_jax.config import Config, from_dict
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import ConfigError
from uoe_jax.train.step import build, learning_rate


def config(train=None, optimizer=None, **model) -> Config:
    return from_dict(
        {
            "model": {**MODEL, **model},
            "train": {"batch_size": 4, **(train or {})},
            "optimizer": {"warmup_steps": 2, **(optimizer or {})},
            "mesh": {"data": 1},
        }
    )


def gradient(c: Config):
    """Gradients of one step, read off Adam's first moment (0.1 of them, before any clipping)."""
    p = program(c)
    state, metrics = p.train_step(p.init(jax.random.key(0)), batch())
    return optax.tree_utils.tree_get(state.opt, "mu"), metrics


@pytest.mark.parametrize("remat", [slow("none"), slow("dots"), "block"])
def test_remat_changes_nothing(remat):
    kept, _ = gradient(config(optimizer={"clip_norm": 0.0}))
    other, _ = gradient(config(optimizer={"clip_norm": 0.0}, remat=remat))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_bfloat16_is_close_and_parameters_stay_float32():
    c = config(dtype="bfloat16", attention="dense", mlp="dense")
    p = program(c)
    state, metrics = p.train_step(p.init(jax.random.key(0)), batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, exact = gradient(config(attention="dense", mlp="dense"))
    assert float(metrics["sums"].nll) == pytest.approx(float(exact["sums"].nll), rel=1e-2)


def test_decay_applies_to_matrices_only():
    """With zero gradients AdamW only decays: what started random shrinks, scales and biases do not move."""
    c = config(bias=True, norm="layernorm", optimizer={"weight_decay": 0.5, "learning_rate": 0.1})
    p = program(c)
    state = p.init(jax.random.key(0))
    before = jax.device_get(state.params)
    empty = {**batch(), "segments": np.zeros((4, 32), np.int32)}
    state, _ = p.train_step(state, empty)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(before), jax.tree.leaves(state.params), strict=True
    ):
        name = path[-1].key
        moved = not np.array_equal(a, b)
        assert moved == (name.startswith("w_") or name in ("kernel", "embedding")), (
            jax.tree_util.keystr(path)
        )


def test_schedule():
    c = config(
        optimizer={"learning_rate": 1.0, "warmup_steps": 10, "final_fraction": 0.1}
    ).optimizer
    with jax.numpy_dtype_promotion("standard"):
        rate = learning_rate(c, 100)
        assert float(rate(0)) == pytest.approx(0.1)
        assert float(rate(9)) == pytest.approx(1.0)
        assert float(rate(99)) == pytest.approx(0.1, abs=1e-3)
        assert float(learning_rate(c, 5)(4)) == pytest.approx(
            0.5
        )  # a run shorter than its warmup ends inside it


def test_mesh_errors_name_the_numbers():
    c = from_dict({"mesh": {"data": 3}, "train": {"batch_size": 12}})
    with pytest.raises(ConfigError, match="3 devices and there are 8"):
        mesh_lib.make_mesh(c.mesh)
    mesh = mesh_lib.make_mesh(from_dict({}).mesh)
    assert dict(mesh.shape) == {"replica": 1, "data": 8, "fsdp": 1, "expert": 1}
    with pytest.raises(ConfigError, match="batch_size"):
        build(config(train={"batch_size": 4}), mesh)


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    """The step on a mesh of data, fsdp and expert gives the losses of one device (contract 6 in small)."""
    c = config(train={"batch_size": 8})
    losses = []
    for sizes, devices in ({"data": 1}, 1), ({"data": 2, "fsdp": 2, "expert": 2}, 8):
        mesh = mesh_lib.make_mesh(from_dict({"mesh": sizes}).mesh, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            p = build(c, mesh)
            state = p.init(jax.random.key(0))
            rows = mesh_lib.put_batch(mesh, batch(rows=8))
            losses.append([])
            for _ in range(3):
                state, metrics = p.train_step(state, rows)
                losses[-1].append(float(metrics["sums"].nll))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_compile_time_does_not_grow_with_depth():
    """24 layers compile in at most 1.5 times the time of 4."""
    seconds = {}
    cache = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        for n_layers in (4, 24, 4, 24):
            p = program(config(n_layers=n_layers))
            lowered = p.train_step.lower(p.abstract, batch())
            start = time.perf_counter()
            lowered.compile()
            seconds.setdefault(n_layers, []).append(time.perf_counter() - start)
    finally:
        jax.config.update("jax_enable_compilation_cache", cache)
    assert min(seconds[24]) <= 1.5 * min(seconds[4]), seconds


def test_moments_in_bfloat16_are_held_so_and_computed_with_in_float32():
    """Half the bytes, and after 3 steps parameters near those of float32; not where the second moment would stand still."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = program(config(optimizer={"moment_dtype": dtype}))
        state = run.init(jax.random.key(0))
        for _ in range(3):
            state, _ = run.train_step(state, batch())
        held = {
            a.dtype for a in jax.tree.leaves(state.opt) if jnp.issubdtype(a.dtype, jnp.floating)
        }
        assert held == {jnp.dtype(dtype)} and {a.dtype for a in jax.tree.leaves(state.params)} == {
            jnp.dtype("float32")
        }
        found[dtype] = state.params
    assert 0 < reference.norm_error(found["bfloat16"], found["float32"]) < 2e-3
    for b2 in (
        0.99,
        0.999,
    ):  # of 0.99 a moment that should fall a hundredfold was half as large again as it should be
        with pytest.raises(ConfigError, match=f"moment_dtype.*b2={b2}.*use float32"):
            config(optimizer={"moment_dtype": "bfloat16", "b2": b2})
