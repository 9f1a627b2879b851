"""Performer (Choromanski et al. 2020, arXiv 2009.14794): softmax attention by positive orthogonal random features, FAVOR+.

exp(q·k) is the mean of φ(q)·φ(k) over R drawn directions w, `φ(x) = exp(w·x − |x|²/2)`; keys and values are then summed up once
for all queries. Directions are orthogonal in blocks of Dh, as long as normal ones, drawn once with the weights and shared by
the heads of a layer (the authors can draw them again while training). Padding has no features φ(k), and what is subtracted
in the exponents against overflow is taken from a row's own tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.encoder import EncoderAttention, exactly
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import weight

SMALL = 1e-4  # added to every feature, as the authors do


class Performer(EncoderAttention):
    """model.attention='performer'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        shape = (c.performer.features, c.head_dim)
        self.directions = weight(
            rngs, shape, (None, None), orthogonal_normal, exact=True, trained=False
        )

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        there = valid_BL[..., None, None]
        w_Rk = jax.lax.stop_gradient(self.directions[...])
        q, k = (a.astype(jnp.float32) * a.shape[-1] ** -0.25 for a in (q, k))
        along_q, along_k = (exactly("blhk,rk->blhr", a, w_Rk) for a in (q, k))
        half_q, half_k = (jnp.square(a).sum(axis=-1, keepdims=True) / 2 for a in (q, k))
        most_q = jax.lax.stop_gradient(along_q.max(axis=-1, keepdims=True))
        most_k = jax.lax.stop_gradient(
            jnp.where(there, along_k, -1e30).max(axis=(1, 3), keepdims=True)
        )
        phi_q = jnp.exp(along_q - half_q - most_q) + SMALL
        phi_k = jnp.where(there, jnp.exp(jnp.where(there, along_k - half_k - most_k, 0)) + SMALL, 0)
        summed = exactly("blhr,blhk->bhrk", phi_k, v.astype(jnp.float32))
        total = exactly("blhr,bhr->blh", phi_q, phi_k.sum(axis=1))
        # A row of padding has no total; whatever it is divided by, its gradient must stay finite.
        return exactly("blhr,bhrk->blhk", phi_q, summed) / jnp.where(total > 0, total, 1)[..., None]


def orthogonal_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """[R,Dh]: rows that are orthogonal in blocks of Dh, each with the length of a normal vector."""
    r, dh = shape
    directions, lengths = jax.random.split(key)
    blocks = jax.random.normal(directions, (-(-r // dh), dh, dh), dtype)
    q, triangle = jnp.linalg.qr(blocks)
    # As Gram and Schmidt give them: signs left to the factorisation favour a side, and the mean over directions is off.
    q = q * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None]
    rows = q.swapaxes(-1, -2).reshape(-1, dh)[:r]
    return rows * jnp.linalg.norm(
        jax.random.normal(lengths, (r, dh), dtype), axis=-1, keepdims=True
    )
