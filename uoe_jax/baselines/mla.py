"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437, section 2.1.1).

Keys and values are made of one narrow latent of a token, and that is what decoding keeps, with one rotary key that all heads
share. A query is compared by two parts: Dh numbers without positions against a key made of the latent, and `d_rope` rotated
ones against the shared key. Latents are normalised (RMSNorm). Decoding never makes keys or values of the tokens before: the
projections out of the latent are applied to the query, and to the weighted sum of latents.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region
from uoe_jax.layers.attention import Heads, attend, group_keys
from uoe_jax.layers.common import (
    Tokens,
    add_bias,
    linear,
    ones,
    rms_norm,
    rotate,
    scaled_normal,
    weight,
    zeros,
)


class MLACache(NamedTuple):
    """Latents [B,context,R] and rotated shared keys [B,context,d_rope]."""

    latent: jax.Array
    rotary: jax.Array


class MLA(Heads):
    """model.attention='mla'. On a mesh, heads lie on `expert`; every part makes the latents. With biases: one, of the output.

    Of the dense block it has the frame and the way out, and none of the projections.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, h, dh, r, dr, q_rank = (
            c.d_model,
            c.n_heads,
            c.head_dim,
            c.mla.kv_rank,
            c.rotary_dim,
            c.mla.q_rank,
        )
        self.causal, self.drop_rate, self.eps, self.dtype = (
            c.causal,
            c.attention_dropout,
            c.norm_eps,
            c.dtype,
        )
        self.w_latent = weight(rngs, (d, r + dr), ("embed", None), scaled_normal(d))
        self.latent_scale = weight(rngs, (r,), (None,), ones)
        self.w_k = weight(rngs, (r, h, dh), (None, "heads", None), scaled_normal(r))
        self.w_v = weight(rngs, (r, h, dh), (None, "heads", None), scaled_normal(r))
        self.w_down = (
            weight(rngs, (d, q_rank), ("embed", None), scaled_normal(d)) if q_rank else None
        )
        self.q_scale = weight(rngs, (q_rank,), (None,), ones) if q_rank else None
        into = ((q_rank, None), (d, "embed"))[not q_rank]
        self.w_q = weight(
            rngs, (into[0], h, dh + dr), (into[1], "heads", None), scaled_normal(into[0])
        )
        self.w_o = weight(rngs, (h, dh, d), ("heads", None, "embed"), scaled_normal(d, c.out_scale))
        self.bias_out = weight(rngs, (d,), (None,), zeros) if c.bias else None

    def _forward(
        self, x_BLD: jax.Array, tokens: Tokens, region: Region = WHOLE
    ) -> tuple[jax.Array, None, jax.Array, jax.Array]:
        alike_BLD, own_BLD = region.gather_inputs(x_BLD.astype(self.dtype))
        latent_BLR, rotary_BLr = self._latent(alike_BLD, tokens.rotary)
        q_BLhk = self._queries(
            own_BLD if self.w_down is None else region.as_varying(self._narrow(alike_BLD)),
            tokens.rotary,
        )
        own_BLR, own_rotary_BL1r = (
            region.as_varying(latent_BLR),
            region.as_varying(rotary_BLr)[:, :, None],
        )
        k_BLhk, v_BLhk = (
            checkpoint_name(self._heads(own_BLR, w), "qkv") for w in (self.w_k, self.w_v)
        )
        shared_BLhr = jnp.broadcast_to(own_rotary_BL1r, (*k_BLhk.shape[:3], rotary_BLr.shape[-1]))
        keys_BH = (
            None
            if tokens.keys_B is None
            else group_keys(tokens.keys_B, k_BLhk.shape[2], region.shard_index)
        )
        k = jnp.concatenate([k_BLhk, shared_BLhr], axis=-1)
        o = attend(q_BLhk, k, v_BLhk, tokens.segments_BL, self.causal, self.drop_rate, keys_BH)
        y_BLD = region.reduce_outputs(self._out(o))
        return (
            add_bias(y_BLD, region.weight_for_local_tokens(self.bias_out)),
            None,
            latent_BLR,
            rotary_BLr,
        )

    def _latent(self, x: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array]:
        """(normalised latent [...,R], rotated shared key [...,d_rope])."""
        both = linear(x, self.w_latent[...].astype(self.dtype))
        r = self.latent_scale.shape[0]
        latent = rms_norm(both[..., :r], self.latent_scale[...], self.eps).astype(self.dtype)
        return latent, rotate(both[..., None, r:], rotary)[..., 0, :]

    def _narrow(self, x: jax.Array) -> jax.Array:
        assert (
            self.w_down is not None and self.q_scale is not None
        )  # asked for where there is a q_rank
        narrow = linear(x, self.w_down[...].astype(self.dtype))
        return rms_norm(narrow, self.q_scale[...], self.eps).astype(self.dtype)

    def _queries(self, x: jax.Array, rotary: Any) -> jax.Array:
        """[...,H,Dh + d_rope], the latter rotated; x is what the queries are made of."""
        q = checkpoint_name(self._heads(x, self.w_q), "qkv")
        dh = self.w_k.shape[-1]
        return jnp.concatenate([q[..., :dh], rotate(q[..., dh:], rotary)], axis=-1)

    def _heads(self, x: jax.Array, w: nnx.Param) -> jax.Array:
        return linear(x, w[...].astype(self.dtype))

    def prefill(self, x_BLD: jax.Array, tokens: Tokens, context: int) -> tuple[jax.Array, MLACache]:
        """The whole prompt, and its latents and shared keys with room for `context` tokens."""
        y_BLD, _, latent_BLR, rotary_BLr = self._forward(x_BLD, tokens)
        room = ((0, 0), (0, context - x_BLD.shape[1]), (0, 0))
        return y_BLD, MLACache(jnp.pad(latent_BLR, room), jnp.pad(rotary_BLr, room))

    def decode_step(
        self, x_BD: jax.Array, cache: MLACache, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, MLACache]:
        """Token `t_B` of each sequence; rotary tables are [B,d_rope/2]."""
        x_BD = x_BD.astype(self.dtype)
        latent_BR, rotary_Br = self._latent(x_BD, rotary)
        rows = jnp.arange(x_BD.shape[0])
        cache = MLACache(
            cache.latent.at[rows, t_B].set(latent_BR), cache.rotary.at[rows, t_B].set(rotary_Br)
        )
        q_BHk = self._queries(x_BD if self.w_down is None else self._narrow(x_BD), rotary)
        dh = self.w_k.shape[-1]
        q_BHR = jnp.einsum("bhk,rhk->bhr", q_BHk[..., :dh], self.w_k[...].astype(self.dtype))
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores_BHS = einsum("bhr,bsr->bhs", q_BHR, cache.latent)
        scores_BHS += einsum("bhk,bsk->bhs", q_BHk[..., dh:], cache.rotary)
        seen_BS = jnp.arange(cache.latent.shape[1])[None] <= t_B[:, None]
        scores_BHS = jnp.where(seen_BS[:, None], scores_BHS * q_BHk.shape[-1] ** -0.5, -1e30)
        weights_BHS = jax.nn.softmax(scores_BHS).astype(self.dtype)
        mixed_BHR = einsum("bhs,bsr->bhr", weights_BHS, cache.latent).astype(self.dtype)
        o_BHk = jnp.einsum("bhr,rhk->bhk", mixed_BHR, self.w_v[...].astype(self.dtype))
        return add_bias(self._out(o_BHk), self.bias_out), cache
