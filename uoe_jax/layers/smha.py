"""SMHA: selective multi-head attention. Dense attention cut in N groups of heads, each attending among its slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.routing import RoutingConfig
from uoe_jax.layers.attention import attend, attend_one, cache_of, group_keys, placed, put
from uoe_jax.layers.common import Tokens, add_bias, ones, scaled_normal, valid_tokens, weight, zeros
from uoe_jax.layers.router import RouterCache
from uoe_jax.layers.union import Slots, Union, per_expert, per_expert_each
from uoe_jax.moe.routing import UNION, Rule


class SMHACache(NamedTuple):
    """Keys and values of the tokens each expert selected, [N,B,g,S,Dh], and the routing state."""

    k: jax.Array
    v: jax.Array
    router: RouterCache


class SMHA(Union):
    """Selective Multi-Head Attention: a slot neither queries nor is attended to in a head that did not select it.

    Args:
      d_model, n_heads, n_kv_heads: D, H and G of the whole block; an expert has h = H/N and g = G/N heads.
      routing: N, K, capacity, patch size, gate.
      bias: biases of q, k, v per expert, one output bias for the union. qkv_bias: the former alone.
      causal: admit only what cannot see the future. drop_rate: dropout of the attention weights, in training.
      qk_norm_eps: RMSNorm over every query and key, with a scale that all experts share; None: none.
      dtype: of the computation; weights are float32. rule: what the router's logits mean.

    Raises:
      ValueError: N does not divide H or G; K above N; causal with a unit or priority that sees the future. ConfigError: a value of
        `routing` that its declaration does not allow.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        routing: RoutingConfig,
        *,
        n_kv_heads: int = 0,
        bias: bool = False,
        qkv_bias: bool = False,
        causal: bool = False,
        drop_rate: float = 0.0,
        qk_norm_eps: float | None = None,
        dtype: Any = jnp.float32,
        out_scale: float = 1.0,
        rule: Rule = UNION,
        rngs: nnx.Rngs,
    ) -> None:
        d, n, kv_heads = d_model, routing.n_experts, n_kv_heads or n_heads
        if n_heads % n or kv_heads % n:
            raise ValueError(
                f"n_heads={n_heads} and n_kv_heads={kv_heads} must both be multiples of n_experts={n}"
            )
        h, g, dh = n_heads // n, kv_heads // n, d // n_heads
        super().__init__(d, routing, causal=causal, dtype=dtype, rule=rule, rngs=rngs)
        self.drop_rate, self.qk_norm_eps = drop_rate, qk_norm_eps
        into = ("expert", "embed", None, None)
        self.w_q = weight(rngs, (n, d, h, dh), into, scaled_normal(d))
        self.w_k = weight(rngs, (n, d, g, dh), into, scaled_normal(d))
        self.w_v = weight(rngs, (n, d, g, dh), into, scaled_normal(d))
        self.w_o = weight(
            rngs, (n, h, dh, d), ("expert", None, None, "embed"), scaled_normal(d, out_scale)
        )
        self.b_q = (
            weight(rngs, (n, h, dh), ("expert", None, None), zeros) if bias or qkv_bias else None
        )
        self.b_k = (
            weight(rngs, (n, g, dh), ("expert", None, None), zeros) if bias or qkv_bias else None
        )
        self.b_v = (
            weight(rngs, (n, g, dh), ("expert", None, None), zeros) if bias or qkv_bias else None
        )
        self.q_scale = weight(rngs, (dh,), (None,), ones) if qk_norm_eps else None
        self.k_scale = weight(rngs, (dh,), (None,), ones) if qk_norm_eps else None
        self.bias_out = weight(rngs, (d,), (None,), zeros) if bias else None

    def _enter(self, x_NBSD: jax.Array) -> tuple[jax.Array, ...]:
        weights, biases = (self.w_q, self.w_k, self.w_v), (self.b_q, self.b_k, self.b_v)
        n, d, _, dh = self.w_q.shape
        found = per_expert_each(
            x_NBSD, [w[...].astype(self.dtype).reshape(n, d, -1) for w in weights]
        )
        by_head = (y.reshape(*y.shape[:3], -1, dh) for y in found)
        return tuple(
            add_bias(y, None if b is None else b[...][:, None, None])
            for y, b in zip(by_head, biases)
        )

    def _experts(
        self, entered: tuple[jax.Array, ...], slots: Slots
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = (checkpoint_name(a, "qkv") for a in entered)
        q, k = self._placed(q, k, slots.rotary)
        n, b = q.shape[:2]
        # Empty slots come last, so the causal mask already hides them; without it, what is filled is a length.
        lengths_NB = None if self.causal else slots.filled_NBS.sum(axis=-1, dtype=jnp.int32)
        q_R, k_R, v_R = (a.reshape(n * b, *a.shape[2:]) for a in (q, k, v))
        by_row = (slots.segments_NBS, slots.keys_NB, lengths_NB)
        segments, keys, lengths = (
            a if a is None else a.reshape(n * b, *a.shape[2:]) for a in by_row
        )
        keys_RG = None if keys is None else group_keys(keys, k.shape[3])
        o_NBShk = attend(
            q_R, k_R, v_R, segments, self.causal, self.drop_rate, keys_RG, lengths
        ).reshape(q.shape)
        if (
            lengths is not None
        ):  # what a kernel leaves in places behind them: 0 times that must be 0
            o_NBShk = jnp.where(slots.filled_NBS[..., None, None], o_NBShk, 0)
        return self._out(o_NBShk, slots.weight_NBS), (k, v)

    def _placed(self, q: jax.Array, k: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array]:
        return placed(q, self.q_scale, self.qk_norm_eps, rotary), placed(
            k, self.k_scale, self.qk_norm_eps, rotary
        )

    def _out(self, o_NBShk: jax.Array, weight_NBS: jax.Array) -> jax.Array:
        # On the heads' values, narrower than the outputs: the same sum, and no outputs kept for the gradient.
        o_NBShk = o_NBShk * weight_NBS[..., None, None].astype(self.dtype)
        n, h, dh, d = self.w_o.shape
        o_NBSX = o_NBShk.reshape(*o_NBShk.shape[:3], h * dh)
        return per_expert(o_NBSX, self.w_o[...].astype(self.dtype).reshape(n, h * dh, d))

    def prefill(
        self, x_BLD: jax.Array, tokens: Tokens, context: int
    ) -> tuple[jax.Array, SMHACache]:
        """The whole prompt, and a cache with a place for every token an expert may select among `context`."""
        y_BLD, _, selection, (k, v) = self._forward(x_BLD, tokens)
        places = self.routing.slot_tokens(context)
        router = self.router.start_cache(
            selection, valid_tokens(tokens.segments_BL, x_BLD).sum(axis=1)
        )
        return y_BLD, SMHACache(cache_of(k, places), cache_of(v, places), router)

    def decode_step(
        self, x_BD: jax.Array, cache: SMHACache, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, SMHACache]:
        """Token `t_B` of each sequence; rotary tables are [B,Dh/2]."""
        x_BD = x_BD.astype(self.dtype)
        router = self.router.decode_step(x_BD, cache.router, t_B)
        q, k, v = self._enter(x_BD[None, :, None])
        tables = None if rotary is None else tuple(t[None, :, None] for t in rotary)
        q, k = self._placed(q, k, tables)
        p = self.routing.patch_size
        place_NB = ((router.filled_BN - 1) * p + (t_B % p)[:, None]).T
        # Experts that did not take the patch write past the end, which drops the write.
        into_NB = jnp.where(router.kept_BN.T, place_NB, cache.k.shape[3])
        cache = SMHACache(
            put(cache.k, k[:, :, 0], into_NB), put(cache.v, v[:, :, 0], into_NB), router
        )
        o = attend_one(q[:, :, 0], cache.k, cache.v, place_NB)[:, :, None]
        return self._union(self._out(o, router.weight_BN.T[..., None]), x_BD), cache
