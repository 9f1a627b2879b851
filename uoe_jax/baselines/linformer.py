"""Linformer (Wang et al. 2020, arXiv 2006.04768): keys and values of a row are projected from L tokens to R.

K̄ = EᵀK and V̄ = FᵀV with E, F [L,R] that all heads share, and softmax attention over these R. A row's padding is zero in both
sums. E and F belong to positions, so that the context length is part of the model. Of the authors' ways to share projections
this is one for all heads of a layer, keys and values apart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.encoder import EncoderAttention, products, shares
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import scaled_normal, weight


class Linformer(EncoderAttention):
    """model.attention='linformer'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        shape = (c.block_length, c.linformer.rank)
        self.w_keys = weight(rngs, shape, (None, None), scaled_normal(c.block_length))
        self.w_values = weight(rngs, shape, (None, None), scaled_normal(c.block_length))

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        there = valid_BL[..., None, None].astype(k.dtype)
        length = q.shape[1]
        few_k, few_v = (
            jnp.einsum("blhk,lr->brhk", a * there, w[...][:length].astype(a.dtype))
            for a, w in ((k, self.w_keys), (v, self.w_values))
        )
        weights_BhLR = shares(products("blhk,brhk->bhlr", q, few_k) * q.shape[-1] ** -0.5)
        return products("brhk,bhlr->blhk", few_v, weights_BhLR)
