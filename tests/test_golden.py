"""The released PyTorch modules' outputs (tests/golden/README.md), reproduced through the public modules."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.layers.common import Tokens

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = sorted(p.name for p in GOLDEN.glob("*.npz"))


def put(param: nnx.Param, value: np.ndarray) -> None:
    assert param.shape == value.shape, (param.shape, value.shape)
    param[...] = jnp.asarray(value)


def run(block: nnx.Module, *args):
    graphdef, state = nnx.split(block)
    return jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))(state, *args)


def test_every_file_is_here():
    assert len(FILES) == 6


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("name", [f for f in FILES if f.startswith("smha")])
def test_smha(name, priority):
    g = np.load(GOLDEN / name)
    b, l, d = g["x"].shape
    n, k, dh = int(g["n"]), int(g["topk"]), g["qkv_w"].shape[2] // 3
    routing = RoutingConfig(
        n_experts=n,
        k=k,
        capacity_factor=n / k,
        capacity_window=l,
        priority=priority,
        gate="none",
        router_bias=True,
    )
    block = nnx.merge(*reference.build(lambda: SMHA(d, n, routing, bias=True, rngs=nnx.Rngs(0))))
    put(block.router.kernel, g["gate_w"].T)
    put(block.router.bias, g["gate_b"])
    for i, (w, bias) in enumerate(
        ((block.w_q, block.b_q), (block.w_k, block.b_k), (block.w_v, block.b_v))
    ):
        part = slice(i * dh, (i + 1) * dh)
        put(w, g["qkv_w"][:, :, None, part])
        put(bias, g["qkv_b"][:, :, part])
    put(block.w_o, g["out_w"][:, None])
    put(block.bias_out, np.zeros(d, np.float32))
    ok = g["mask"] > 0
    tokens = Tokens(jnp.asarray(ok.astype(np.int32)), jnp.broadcast_to(jnp.arange(l), (b, l)))
    y, stats = run(block, jnp.asarray(g["x"]), tokens)
    taken = np.einsum("bln,nd->bld", g["assigned"].astype(np.float32), g["out_b"])
    assert reference.error(np.asarray(y)[ok], (g["y"] - taken)[ok]) < 1e-5
    assert not np.asarray(y)[~ok].any()
    np.testing.assert_array_equal(stats.kept_N, g["assigned"][ok].sum(0))


@pytest.mark.parametrize("name", [f for f in FILES if f.startswith("uome")])
def test_uome(name):
    g = np.load(GOLDEN / name)
    l, n, c = g["x"].shape[1], int(g["n"]), int(g["capacity"])
    routing = RoutingConfig(
        n_experts=n, k=n, capacity_factor=c / l, priority="score", gate="none", router_bias=True
    )
    assert routing.slots(l) == c
    d, f = g["w1"].shape[1], n * g["w1"].shape[2]
    block = nnx.merge(*reference.build(lambda: UoME(d, f, routing, bias=True, rngs=nnx.Rngs(0))))
    put(block.router.kernel, g["gate_w"].T)
    put(block.router.bias, g["gate_b"])
    put(block.w_up, g["w1"])
    put(block.b_up, g["b1"][:, 0])
    put(block.w_down, g["w2"])
    put(block.bias_out, np.zeros(d, np.float32))
    y, stats = run(block, jnp.asarray(g["x"]))
    logits = g["x"][0].astype(np.float64) @ g["gate_w"].T + g["gate_b"]
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    taken = np.zeros((l, n), np.float32)
    for e in range(n):
        taken[np.argsort(-scores[:, e])[:c], e] = 1
    assert reference.error(np.asarray(y)[0], g["y"][0] - taken @ g["b2"]) < 1e-5
    np.testing.assert_array_equal(stats.kept_N, [c] * n)
    assert float(stats.untouched) == (taken.sum(1) == 0).sum()
