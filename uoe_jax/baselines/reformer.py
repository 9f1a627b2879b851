"""Reformer (Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451): attention among tokens that a hash puts together, for encoders.

Queries and keys are one projection, keys of length 1. In every round a token's bucket is the nearest of n_buckets drawn
directions; tokens are sorted by bucket, cut in chunks, and attend to their own chunk and the one before it, the first of a
round to the last of the round before. A token attends to itself only where there is nothing else. Rounds are weighed by
their softmax totals, and a pair that meets in several rounds counts in each (the paper divides by their number, N_ij; the
implementation that this equals does not). Rotary positions, which the authors do not have, turn what is compared and not what is hashed. Directions
are drawn once with the weights (the authors draw them at every step). Padding is sorted to the end and belongs to no chunk; the
last chunk is the last one with tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.baselines.encoder import EncoderAttention, exactly, products
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.attention import placed
from uoe_jax.layers.common import add_bias, linear, pad_sequence, weight

ITSELF = -1e5  # the score of a token with itself: less than any other, more than none


class Reformer(EncoderAttention):
    """model.attention='reformer'; it has no w_k. There are twice as many buckets as chunks in a row of the context's length."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        self.w_k = self.b_k = None
        self.chunk = c.reformer.chunk
        half = -(-c.block_length // self.chunk)
        shape = (c.n_heads, c.head_dim, c.reformer.n_hashes, half)
        self.rotations = weight(
            rngs,
            shape,
            ("heads", None, None, None),
            nnx.initializers.normal(1.0),
            exact=True,
            trained=False,
        )

    def _project(self, x: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        qk, v = (
            checkpoint_name(add_bias(linear(x, w[...].astype(self.dtype)), b), "qkv")
            for w, b in ((self.w_q, self.b_q), (self.w_v, self.b_v))
        )
        # What is hashed is not turned: equal tokens fall into one bucket wherever they are.
        return placed(qk, None, None, rotary), qk, v

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        b, length, h, dh = q.shape  # k: the same as q, as it is hashed
        more = -length % self.chunk
        q, hashed, v, valid_BT = (pad_sequence(a, more) for a in (q, k, v, valid_BL))
        q_BhTk, hashed_BhTk, v_BhTk = (a.transpose(0, 2, 1, 3) for a in (q, hashed, v))
        order_BhRT, place_BhRT = self._sorted(hashed_BhTk, valid_BT)
        n_hashes, t = order_BhRT.shape[2:]

        def at(a_BhTx: jax.Array) -> jax.Array:
            """Rows in sorted order, cut in chunks: [B,h,R,chunks,chunk,…]."""
            index = order_BhRT.reshape(b, h, n_hashes * t, 1)
            return jnp.take_along_axis(a_BhTx, index, axis=2).reshape(
                b, h, n_hashes, -1, self.chunk, a_BhTx.shape[-1]
            )

        keys, values = at(unit(q_BhTk)), at(v_BhTk)
        own = order_BhRT.reshape(b, h, n_hashes, -1, self.chunk)
        n_B = valid_BT.sum(axis=1, dtype=jnp.int32)
        there = jnp.take_along_axis(valid_BT[:, None, None], order_BhRT, axis=-1).reshape(own.shape)
        last_B = jnp.maximum(-(-n_B // self.chunk) - 1, 0)
        keys, values, places = (
            jnp.concatenate([before(a, last_B), a], axis=4) for a in (keys, values, own)
        )
        # A row of one chunk has none before it: what stands there is the chunk itself.
        first = before(there, last_B) & (last_B > 0)[:, None, None, None, None]
        there = jnp.concatenate([first, there], axis=4)
        scores = products("bhrcqk,bhrcsk->bhrcqs", at(q_BhTk), keys)
        scores = jnp.where(own[..., :, None] == places[..., None, :], ITSELF, scores)
        scores = jnp.where(there[..., None, :], scores, -1e30)
        total = jax.nn.logsumexp(scores, axis=-1)
        mixed = products("bhrcsk,bhrcqs->bhrcqk", values, jnp.exp(scores - total[..., None]))
        mixed, total = mixed.reshape(b, h, n_hashes, t, dh), total.reshape(b, h, n_hashes, t)
        return combined(mixed, total, place_BhRT).transpose(0, 2, 1, 3)[:, :length]

    def _sorted(self, hashed_BhTk: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(int32 [B,h,R,T]: the tokens of every round in the order of their buckets, and the inverse); padding comes last."""
        directions = jax.lax.stop_gradient(self.rotations[...])
        turned = exactly(
            "bhtk,hkrn->bhrtn", jax.lax.stop_gradient(hashed_BhTk).astype(jnp.float32), directions
        )
        bucket_BhRT = jnp.concatenate([turned, -turned], axis=-1).argmax(axis=-1)
        bucket_BhRT = jnp.where(valid_BT[:, None, None], bucket_BhRT, 2 * directions.shape[-1])
        order = jnp.argsort(bucket_BhRT, axis=-1, stable=True).astype(jnp.int32)
        return order, jnp.argsort(order, axis=-1).astype(jnp.int32)


def combined(mixed_BhRTk: jax.Array, total_BhRT: jax.Array, place_BhRT: jax.Array) -> jax.Array:
    """[B,h,T,Dh]: the rounds' values in the tokens' own order, weighed by the softmax over the rounds of their totals."""
    total_BhRT = jnp.take_along_axis(total_BhRT, place_BhRT, axis=-1)
    mixed_BhRTk = jnp.take_along_axis(mixed_BhRTk, place_BhRT[..., None], axis=3)
    return (mixed_BhRTk * jax.nn.softmax(total_BhRT, axis=2)[..., None]).sum(axis=2)


def unit(x: jax.Array) -> jax.Array:
    """x [...,Dh] with length 1."""
    y = x.astype(jnp.float32)
    return (
        y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6) * y.shape[-1] ** -0.5
    ).astype(x.dtype)


def before(a: jax.Array, last_B: jax.Array) -> jax.Array:
    """Of chunks [B,h,R,C,…], the one before each: in front of a round's first, the last one with tokens of the round before."""
    index = last_B.reshape(-1, *(1,) * (a.ndim - 1))
    wrapped = jnp.roll(
        jnp.take_along_axis(a, jnp.broadcast_to(index, (*a.shape[:3], 1, *a.shape[4:])), axis=3),
        1,
        axis=2,
    )
    return jnp.concatenate([wrapped, a[:, :, :, :-1]], axis=3)
