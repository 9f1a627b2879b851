"""Nyströmformer (Xiong et al. 2021, arXiv 2102.03902): attention through R landmarks, the means of consecutive tokens.

softmax(Q·K̃ᵀ) · pinv(softmax(Q̃·K̃ᵀ)) · softmax(Q̃·Kᵀ)·V, the pseudo-inverse by iterated products, plus a depthwise
convolution of the values over the tokens. Landmark j is the mean of the tokens from ⌊j·n/R⌋ to ⌊(j+1)·n/R⌋ of a row of n
tokens, its padding left out; the authors cut the padded length, which is the same for full rows that R divides. The first
guess of the inverse is made for every head of every row by itself (the authors' default takes a maximum over the batch).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.encoder import EncoderAttention, exactly, products, shares
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import scaled_normal, weight


class Nystromformer(EncoderAttention):
    """model.attention='nystromformer'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        n = c.nystromformer
        self.landmarks, self.iterations = n.landmarks, n.iterations
        self.w_conv = (
            weight(rngs, (c.n_heads, n.kernel), ("heads", None), scaled_normal(n.kernel))
            if n.kernel
            else None
        )

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        scale = q.shape[-1] ** -0.5  # on the scores, which are float32
        means_BRL, there_BR = landmark_means(valid_BL, self.landmarks)
        few_q, few_k = (products("blhk,brl->brhk", a, means_BRL).astype(a.dtype) for a in (q, k))
        there = there_BR[:, None, None]
        to_few_BhLR = shares(scale * products("blhk,brhk->bhlr", q, few_k), there)
        among_BhRR = shares(scale * products("brhk,bshk->bhrs", few_q, few_k), there)
        # Landmarks without tokens: ones on the diagonal, so that the inverse of the others is what it is without them.
        among_BhRR = jnp.where(
            there_BR[:, None, :, None], among_BhRR, jnp.eye(self.landmarks)[None, None]
        )
        to_all_BhRL = shares(scale * products("brhk,blhk->bhrl", few_q, k), valid_BL[:, None, None])
        few_BhRk = products("blhk,bhrl->bhrk", v, to_all_BhRL)
        inverse_BhRR = pseudo_inverse(among_BhRR, self.iterations)
        y_BLhk = exactly(
            "bhlr,bhrk->blhk", to_few_BhLR, exactly("bhrs,bhsk->bhrk", inverse_BhRR, few_BhRk)
        )
        if self.w_conv is None:
            return y_BLhk
        return y_BLhk + convolved(v * valid_BL[..., None, None].astype(v.dtype), self.w_conv)


def convolved(v: jax.Array, w_conv: nnx.Param) -> jax.Array:
    """Every number of a head over the tokens around, with the head's own kernel: float32 [B,L,h,Dh]."""
    b, length, h, dh = v.shape
    rows = v.transpose(0, 3, 1, 2).reshape(b * dh, length, h)
    kernel = w_conv[...].T[:, None].astype(v.dtype)  # [kernel,1,h]
    y = jax.lax.conv_general_dilated(
        rows,
        kernel,
        (1,),
        "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=h,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(b, dh, length, h).transpose(0, 2, 3, 1)


def landmark_means(valid_BL: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """(float32 [B,R,L]: the share of every token in each of n landmarks, bool [B,R]: which landmarks have tokens)."""
    count_B = valid_BL.sum(axis=1, dtype=jnp.int32)
    edges_BR = jnp.arange(n + 1, dtype=jnp.int32)[None] * count_B[:, None] // n
    place_L = jnp.arange(valid_BL.shape[1], dtype=jnp.int32)[None, None]
    member_BRL = (place_L >= edges_BR[:, :-1, None]) & (place_L < edges_BR[:, 1:, None])
    size_BR = member_BRL.sum(axis=-1)
    return member_BRL.astype(jnp.float32) / jnp.maximum(size_BR, 1).astype(jnp.float32)[
        ..., None
    ], size_BR > 0


def pseudo_inverse(a: jax.Array, iterations: int) -> jax.Array:
    """Of matrices [...,R,R] whose rows sum to 1, by the authors' iteration of third order, in float32."""
    one = jnp.eye(a.shape[-1])[(None,) * (a.ndim - 2)]
    z = a.swapaxes(-1, -2) / a.sum(axis=-2).max(axis=-1)[..., None, None]
    times = functools.partial(exactly, "...rs,...st->...rt")
    for _ in range(iterations):
        az = times(a, z)
        z = times(0.25 * z, 13 * one - times(az, 15 * one - times(az, 7 * one - az)))
    return z
