"""The baselines against independent code (tests/golden/baselines/make.py), and against the contracts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from baseline_vectors import GOLDEN, load, split, under
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.config.baselines import ATTENTIONS, MLPS
from uoe_jax.layers.common import Tokens, rotary_tables, tokens_like

FILES = sorted(p.stem for p in GOLDEN.glob("*.npz"))


def tokens_of(c: ModelConfig, x: jax.Array) -> Tokens:
    tokens = tokens_like(x)
    return (
        tokens._replace(rotary=rotary_tables(tokens.positions_BL, c.rotary_dim, c.rope_theta))
        if c.position == "rope"
        else tokens
    )


def test_every_block_has_a_vector():
    blocks = {name: load(name)[0] for name in FILES}
    assert {c.attention for c in blocks.values()} - {"smha"} == set(ATTENTIONS)
    assert {c.mlp for c in blocks.values()} - {"uome"} == set(MLPS)
    assert len(FILES) == 22


@pytest.mark.parametrize("name", FILES)
def test_values_and_gradients_are_theirs(name):
    c, g = load(name)
    graphdef, state = split(c, under(g, "w/"))

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x, tokens_of(c, x))[0]
        return (y * g["r"]).sum(), y

    (d_w, d_x), y = reference.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        state, jnp.asarray(g["x"])
    )
    assert reference.error(y, g["y"]) < 1e-5
    assert reference.error(d_x, g["d_x"]) < 1e-5
    wanted = under(g, "d/")
    found = {".".join(path): value.value for path, value in nnx.to_flat_state(d_w)}
    for name in wanted:
        assert reference.error(found[name], wanted[name]) < 1e-5, name
    untrained = {"router.load_bias", "directions", "rotations"}
    assert {name for name in wanted if np.abs(wanted[name]).max() < 1e-3} == untrained & set(wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in FILES
        if name not in ("switch", "moh_0", "reformer_32_2", "nystromformer_no_convolution")
    ],
)
def test_sixteen_bits_and_rows_of_padding(name, dtype):
    """Values near those of float32 at the same weights, and finite gradients, with a row that is all padding and one of a token."""
    c, g = load(name)
    x = jnp.concatenate([jnp.asarray(g["x"])] * 2)
    lengths = jnp.array([x.shape[1], 7, 1, 0])
    segments = (jnp.arange(x.shape[1])[None] < lengths[:, None]).astype(jnp.int32)

    def run(c: ModelConfig):
        graphdef, state = split(c, under(g, "w/"))

        def loss(state, x):
            tokens = tokens_of(c, x)._replace(segments_BL=segments)
            y = nnx.merge(graphdef, state)(x.astype(c.dtype), tokens)[0].astype(jnp.float32)
            return jnp.where(segments[..., None] > 0, jnp.square(y), 0).sum(), y

        return reference.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x)

    grads, y = run(dataclasses.replace(c, dtype=dtype))
    assert all(
        np.isfinite(leaf.astype(np.float32)).all()
        for leaf in jax.tree.leaves(jax.device_get((grads, y)))
    )
    _, wanted = run(c)
    # Rounding moves near ties, so that a token may go elsewhere: most, not all, of the values are near.
    near = np.abs(np.asarray(y) - np.asarray(wanted)) < 0.08 * np.abs(np.asarray(wanted)).max()
    assert near[np.asarray(segments) > 0].mean() > (
        0.99 if not c.routed() and c.attention != "reformer" else 0.8
    )
