"""A small model, its batch and its program; runs of it on a mesh, and what the compiler makes of it."""

from __future__ import annotations

import math

import jax
import numpy as np
from flax import nnx

from uoe_jax.config import Config, ModelConfig, from_dict
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.plan.hlo import Collective
from uoe_jax.train.step import build

SMALL = {"n_experts": 4, "k": 2, "capacity_window": 16}

MODEL = dict(
    vocab_size=32,
    d_model=32,
    n_layers=2,
    n_heads=4,
    d_hidden=64,
    context_length=32,
    smha=SMALL,
    uome=SMALL,
)


def batch(rows=4, length=32):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (rows, length), dtype=np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[0, 20:] = 2
    segments[1, 24:] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[0, 20:] -= 20
    n_bytes = np.full(rows, length, np.int32)
    return dict(
        tokens=tokens,
        targets=np.roll(tokens, -1, 1),
        segments=segments,
        positions=positions,
        n_bytes=n_bytes,
    )


def program(c: Config):
    return build(c, mesh_lib.make_mesh(c.mesh, jax.devices()[:1]))


ROUTING = dict(n_experts=8, k=4, capacity_window=16, bias_rate=0.01)

MESH_MODEL = {
    **MODEL,
    "n_heads": 8,
    "smha": ROUTING,
    "uome": ROUTING,
}  # the quickstart's blocks, small

ONE = dict(data=1)


def sized(replica=1, data=1, fsdp=1, expert=1, sequence_parallel=False) -> dict:
    return dict(
        replica=replica, data=data, fsdp=fsdp, expert=expert, sequence_parallel=sequence_parallel
    )


def program_on(sizes: dict, **changes):
    """(program, mesh) of a small model on the first devices that the mesh needs."""
    config = from_dict(
        {
            "model": {**MESH_MODEL, **changes.pop("model", {})},
            "train": {"batch_size": 8, **changes},
            "mesh": sizes,
        }
    )
    mesh = mesh_lib.make_mesh(
        config.mesh, jax.devices()[: math.prod(sizes.get(a, 1) for a in mesh_lib.AXES)]
    )
    with jax.set_mesh(mesh):
        return build(config, mesh), mesh


def train_on(sizes: dict, steps: int, **changes) -> tuple[dict, np.ndarray]:
    """(initial parameters on the host, losses and gradient norms)."""
    program, mesh = program_on(sizes, **changes)
    with jax.set_mesh(mesh):
        state, rows, found = (
            program.init(jax.random.key(0)),
            mesh_lib.put_batch(mesh, batch(rows=8)),
            [],
        )
        first = jax.device_get(state.params)
        for _ in range(steps):
            state, metrics = program.train_step(state, rows)
            found += [float(metrics["sums"].nll), float(metrics["grad_norm"])]
    return first, np.array(found)


def assert_same_training(one, other):
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(other[1], one[1], rtol=1e-5)


def over_expert(found: list[Collective]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted(
        (c.kind, max(c.operand.shape, c.result.shape)) for c in found if "expert" in c.axes
    )


def compilers_count(module, config: ModelConfig, *args, **kwargs) -> float:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    f = jax.jit(lambda state, args, kwargs: nnx.merge(graphdef, state)(*args, **kwargs)[0])
    return f.lower(state, args, kwargs).compile().cost_analysis()["flops"]
