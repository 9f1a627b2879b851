"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; V3, arXiv 2412.19437, section 2.1.1).

Keys and values are projected from a token's narrow latent (RMSNorm). The KV cache holds that
latent, and one rotary key that all heads share. A query has Dh numbers without positions, for keys
made of the latent, and `d_rope` rotated ones, for the shared key. Decoding makes no keys or values
of earlier tokens: it projects the query, and the weighted sum of latents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region
from uoe_jax.layers import common
from uoe_jax.layers.attention import attend, group_keys
from uoe_jax.layers.common import Block, Outputs, Step, Tokens, add_bias, linear
from uoe_jax.layers.weights import ones, scaled_normal, weight, weight_if, zeros


class MLACache(NamedTuple):
    latent: Array  # [B,context,J]
    rotary: Array  # rotated shared keys [B,context,d_rope]


class MLA(Block):
    """model.attention='mla'; of biases, only the output has one. Every shard makes the latents."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, h, dh, j, q_rank = c.d_model, c.n_heads, c.head_dim, c.mla.kv_rank, c.mla.q_rank
        dr, heads = c.rotary_dim, (None, "heads", None)
        self.causal, self.drop_rate = c.causal, c.attention_dropout
        self.eps, self.dtype = c.norm_eps, c.dtype
        self.w_latent = weight(rngs, (d, j + dr), ("embed", None), scaled_normal(d))
        self.latent_scale = weight(rngs, (j,), (None,), ones)
        self.w_k = weight(rngs, (j, h, dh), heads, scaled_normal(j))
        self.w_v = weight(rngs, (j, h, dh), heads, scaled_normal(j))
        self.w_down = weight_if(q_rank, rngs, (d, q_rank), ("embed", None), scaled_normal(d))
        self.q_scale = weight_if(q_rank, rngs, (q_rank,), (None,), ones)
        into = heads if q_rank else ("embed", "heads", None)
        self.w_q = weight(rngs, (q_rank or d, h, dh + dr), into, scaled_normal(q_rank or d))
        self.w_o = weight(rngs, (h, dh, d), ("heads", None, "embed"), scaled_normal(d, c.out_scale))
        self.bias_out = weight_if(c.bias, rngs, (d,), (None,), zeros)

    def _forward(self, x_BLD: Array, tokens: Tokens, region: Region = WHOLE) -> Outputs:
        shared_BLD, x_BLD = region.gather_inputs(x_BLD.astype(self.dtype))
        latent_BLJ, rotary_BLk = self._latent(shared_BLD, tokens.rotary)
        if self.w_down is not None:
            x_BLD = region.as_varying(self._narrow(shared_BLD))
        q = self._queries(x_BLD, tokens.rotary)
        own_BLJ, own_rotary_BLk = region.as_varying(latent_BLJ), region.as_varying(rotary_BLk)
        k, v = (checkpoint_name(self._matmul(own_BLJ, w), "qkv") for w in (self.w_k, self.w_v))
        shape = (*k.shape[:3], rotary_BLk.shape[-1])
        k = jnp.concatenate([k, jnp.broadcast_to(own_rotary_BLk[:, :, None], shape)], axis=-1)
        keys_BH = group_keys(tokens.keys_B, k.shape[2], region.shard_index)
        o = attend(q, k, v, tokens.segments_BL, self.causal, self.drop_rate, keys_BH)
        y_BLD = region.reduce_outputs(self._matmul(o, self.w_o, axes=2))
        bias_D = region.weight_for_local_tokens(self.bias_out)
        return add_bias(y_BLD, bias_D), None, (latent_BLJ, rotary_BLk)

    def _latent(self, x: Array, rotary: Any) -> tuple[Array, Array]:
        """(normalised latent [...,J], rotated shared key [...,d_rope])."""
        both, j = self._matmul(x, self.w_latent), self.latent_scale.shape[0]
        latent = common.rms_norm(both[..., :j], self.latent_scale[...], self.eps).astype(self.dtype)
        return latent, common.rotate(both[..., None, j:], rotary)[..., 0, :]

    def _narrow(self, x: Array) -> Array:
        assert self.w_down is not None and self.q_scale is not None  # there is a q_rank
        narrow = self._matmul(x, self.w_down)
        return common.rms_norm(narrow, self.q_scale[...], self.eps).astype(self.dtype)

    def _queries(self, x: Array, rotary: Any) -> Array:
        """[...,H,Dh + d_rope], the latter rotated, from x or its narrow form."""
        q, dh = checkpoint_name(self._matmul(x, self.w_q), "qkv"), self.w_k.shape[-1]
        return jnp.concatenate([q[..., :dh], common.rotate(q[..., dh:], rotary)], axis=-1)

    def _matmul(self, x: Array, w: nnx.Param, axes: int = 1) -> Array:
        return linear(x, w[...].astype(self.dtype), axes)

    def _start_cache(self, state: Any, tokens: Tokens, context: int) -> MLACache:
        return MLACache(*(common.pad_sequence(a, context - a.shape[1]) for a in state))

    def decode_step(self, x_BD: Array, cache: MLACache, t_B: Array, rotary: Any) -> Step:
        x_BD = x_BD.astype(self.dtype)
        latent_BJ, rotary_Bk = self._latent(x_BD, rotary)
        at, dh = (jnp.arange(x_BD.shape[0]), t_B), self.w_k.shape[-1]
        cache = MLACache(cache.latent.at[at].set(latent_BJ), cache.rotary.at[at].set(rotary_Bk))
        q_BHk = self._queries(x_BD if self.w_down is None else self._narrow(x_BD), rotary)
        q_BHJ = jnp.einsum("bhk,jhk->bhj", q_BHk[..., :dh], self.w_k[...].astype(self.dtype))
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores_BHS = einsum("bhj,bsj->bhs", q_BHJ, cache.latent)
        scores_BHS += einsum("bhk,bsk->bhs", q_BHk[..., dh:], cache.rotary)
        seen_BS = jnp.arange(cache.latent.shape[1])[None] <= t_B[:, None]
        scores_BHS = jnp.where(seen_BS[:, None], scores_BHS * q_BHk.shape[-1] ** -0.5, -1e30)
        weights_BHS = jax.nn.softmax(scores_BHS).astype(self.dtype)
        mixed_BHJ = einsum("bhs,bsj->bhj", weights_BHS, cache.latent).astype(self.dtype)
        o_BHk = jnp.einsum("bhj,jhk->bhk", mixed_BHJ, self.w_v[...].astype(self.dtype))
        return add_bias(self._matmul(o_BHk, self.w_o, axes=2), self.bias_out), cache
