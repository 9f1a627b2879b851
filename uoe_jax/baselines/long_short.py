"""Long-Short Transformer (Zhu et al. 2021, arXiv 2107.02192), for encoders.

A token attends, in one softmax, to the tokens of its own segment of w and of half a segment on either side, and to R dynamic
projections of the whole row: P = softmax over the tokens of X·W_p, by head, K̄ = PᵀK, V̄ = PᵀV (equation 3). Both kinds are
normalised by a LayerNorm of their own (DualLN), here of every head by itself, so that heads do not meet (the authors norm all
heads as one vector), and K̄ and V̄ are made of keys and values as projected (the authors' code norms these first). Padding is
left out of both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.encoder import EncoderAttention, products, shares
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import linear, ones, pad_sequence, scaled_normal, weight, zeros


class LongShort(EncoderAttention):
    """model.attention='long_short'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        h, dh = c.n_heads, c.head_dim
        self.window, self.eps = c.long_short.window, c.norm_eps
        self.w_p = weight(
            rngs,
            (c.d_model, h, c.long_short.rank),
            ("embed", "heads", None),
            scaled_normal(c.d_model),
        )
        self.near_scale, self.far_scale = (
            weight(rngs, (h, dh), ("heads", None), ones, exact=True) for _ in range(2)
        )
        self.near_bias, self.far_bias = (
            weight(rngs, (h, dh), ("heads", None), zeros, exact=True) for _ in range(2)
        )

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        b, length, h, dh = q.shape
        scores_BLhR = linear(x_BLD, self.w_p[...].astype(x_BLD.dtype))
        p_BhRL = shares(scores_BLhR.transpose(0, 2, 3, 1), valid_BL[:, None, None])
        far_k, far_v = (products("blhk,bhrl->brhk", a, p_BhRL) for a in (k, v))
        far_k, far_v = (
            self._normed(a, self.far_scale, self.far_bias, q.dtype) for a in (far_k, far_v)
        )
        near_k, near_v = (self._normed(a, self.near_scale, self.near_bias, q.dtype) for a in (k, v))
        more = -length % self.window
        q_BSwhk = pad_sequence(q, more).reshape(b, -1, self.window, h, dh)
        near_k, near_v, there = (
            around(pad_sequence(a, more), self.window) for a in (near_k, near_v, valid_BL)
        )
        near = products("bswhk,bsthk->bshwt", q_BSwhk, near_k)
        near = jnp.where(there[:, :, None, None], near, -1e30)
        far = products("bswhk,brhk->bshwr", q_BSwhk, far_k)
        weights = shares(jnp.concatenate([near, far], axis=-1) * dh**-0.5)
        near, far = weights[..., : 2 * self.window], weights[..., 2 * self.window :]
        y = products("bsthk,bshwt->bswhk", near_v, near) + products("brhk,bshwr->bswhk", far_v, far)
        return y.reshape(b, -1, h, dh)[:, :length]

    def _normed(
        self, x: jax.Array, scale: nnx.Param, bias: nnx.Param, dtype: jnp.dtype
    ) -> jax.Array:
        """LayerNorm over the last axis of [...,h,Dh], each head with its own scale and bias."""
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * scale[...][None, None] + bias[...][None, None]).astype(dtype)


def around(a_BL: jax.Array, window: int) -> jax.Array:
    """What a segment sees of values [B,L,…], zeros beyond the ends: [B,S,2·w,…] for the S segments of w tokens."""
    half, rest = window // 2, ((0, 0),) * (a_BL.ndim - 2)
    padded = jnp.pad(a_BL, ((0, 0), (half, half), *rest))
    halves = padded.reshape(a_BL.shape[0], -1, half, *a_BL.shape[2:])
    n = a_BL.shape[1] // window
    return jnp.concatenate([halves[:, i : i + 2 * n : 2] for i in range(4)], axis=2)
