"""SMHA, selective multi-head attention: dense attention cut in N groups of heads with own slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.routing import RoutingConfig
from uoe_jax.layers.attention import attend, attend_one, cache_of, group_keys, placed, put
from uoe_jax.layers.common import Step, Tokens, add_bias
from uoe_jax.layers.router import RouterCache
from uoe_jax.layers.union import Slots, Union, per_expert, per_expert_each, per_row
from uoe_jax.layers.weights import ones, scaled_normal, weight, weight_if, zeros
from uoe_jax.moe.routing import UNION, RoutingRule


class SMHACache(NamedTuple):
    """Keys and values of the tokens that each expert took, [N,B,g,S,k], and the routing state."""

    k: Array
    v: Array
    router: RouterCache


class SMHA(Union):
    """Selective Multi-Head Attention: in a head, only the tokens in its expert's slots attend.

    Raises ValueError if N does not divide H or G; else as `Union`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,  # H of the whole block; an expert has H/N heads, and G/N key/value heads
        routing: RoutingConfig,
        *,
        n_kv_heads: int = 0,  # G; 0: H
        bias: bool = False,  # of q, k, v per expert, and one output bias
        qkv_bias: bool = False,  # the former alone
        causal: bool = False,
        drop_rate: float = 0.0,  # dropout of attention weights
        qk_norm_eps: float | None = None,  # QK-norm with one scale for all experts; None: none
        dtype: Any = jnp.float32,  # of the computation; weights are float32
        out_scale: float = 1.0,  # on the initial standard deviation of the output projection
        rule: RoutingRule = UNION,
        rngs: nnx.Rngs,
    ) -> None:
        d, n, kv_heads = d_model, routing.n_experts, n_kv_heads or n_heads
        if n_heads % n or kv_heads % n:
            heads = f"n_heads={n_heads} and n_kv_heads={kv_heads}"
            raise ValueError(f"{heads} must both be multiples of n_experts={n}")
        h, g, dh = n_heads // n, kv_heads // n, d // n_heads
        super().__init__(d, routing, causal, dtype, rule, rngs)
        self.drop_rate, self.qk_norm_eps = drop_rate, qk_norm_eps
        into, out = ("expert", "embed", None, None), ("expert", None, None, "embed")
        self.w_q = weight(rngs, (n, d, h, dh), into, scaled_normal(d))
        self.w_k = weight(rngs, (n, d, g, dh), into, scaled_normal(d))
        self.w_v = weight(rngs, (n, d, g, dh), into, scaled_normal(d))
        self.w_o = weight(rngs, (n, h, dh, d), out, scaled_normal(d, out_scale))
        biased, axes = bias or qkv_bias, ("expert", None, None)
        self.b_q = weight_if(biased, rngs, (n, h, dh), axes, zeros)
        self.b_k = weight_if(biased, rngs, (n, g, dh), axes, zeros)
        self.b_v = weight_if(biased, rngs, (n, g, dh), axes, zeros)
        self.q_scale = weight_if(qk_norm_eps, rngs, (dh,), (None,), ones)
        self.k_scale = weight_if(qk_norm_eps, rngs, (dh,), (None,), ones)
        self.bias_out = weight_if(bias, rngs, (d,), (None,), zeros)

    def _project(self, x_NRSD: Array) -> tuple[Array, ...]:
        n, d, _, dh = self.w_q.shape
        weights = (w[...].astype(self.dtype) for w in (self.w_q, self.w_k, self.w_v))
        projected = per_expert_each(x_NRSD, [w.reshape(n, d, -1) for w in weights])
        heads = (y.reshape(*y.shape[:3], -1, dh) for y in projected)
        biases = (self.b_q, self.b_k, self.b_v)
        return tuple(add_bias(y, per_row(b)) for y, b in zip(heads, biases))

    def _experts(
        self, projected: tuple[Array, ...], slots: Slots
    ) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = (checkpoint_name(a, "qkv") for a in projected)
        q, k = placed(self, q, k, slots.rotary)
        # Empty slots come last: a causal mask hides them, and without it they are a length.
        lengths_NR = None if self.causal else slots.filled_NRS.sum(axis=-1, dtype=jnp.int32)
        merge = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731  # [N,R,…] to [N·R,…]
        more = slots.segments_NRS, slots.keys_NR, lengths_NR
        (q_, k_, v_), (segments, keys, lengths) = jax.tree.map(merge, ((q, k, v), more))
        keys = group_keys(keys, k.shape[3])
        o = attend(q_, k_, v_, segments, self.causal, self.drop_rate, keys, lengths)
        o = o.reshape(q.shape)
        if lengths_NR is not None:  # the kernel may leave NaN in empty slots, and 0 * NaN is NaN
            o = jnp.where(slots.filled_NRS[..., None, None], o, 0)
        return self._out(o, slots.weight_NRS), (k, v)

    def _out(self, o: Array, weight_NRS: Array) -> Array:
        # Weights go on the narrow values of heads: the same sum, no outputs kept for the gradient.
        o = o * weight_NRS[..., None, None].astype(self.dtype)
        n, h, dh, d = self.w_o.shape
        kernel = self.w_o[...].astype(self.dtype).reshape(n, h * dh, d)
        return per_expert(o.reshape(*o.shape[:3], h * dh), kernel)

    def _start_cache(self, state: Any, tokens: Tokens, context: int) -> SMHACache:
        """A cache with a place for every token that an expert may take among `context`."""
        selection, (k, v) = state
        places = self.routing.slot_tokens(context)
        router = self.router.start_cache(selection, tokens)
        return SMHACache(cache_of(k, places), cache_of(v, places), router)

    def decode_step(self, x_BD: Array, cache: SMHACache, t_B: Array, rotary: Any) -> Step:
        x_BD = x_BD.astype(self.dtype)
        router = self.router.decode_step(x_BD, cache.router, t_B)
        q, k, v = self._project(x_BD[None, :, None])
        tables = None if rotary is None else tuple(t[None, :, None] for t in rotary)
        q, k = placed(self, q, k, tables)
        p = self.routing.patch_size
        place_NB = ((router.filled_BN - 1) * p + (t_B % p)[:, None]).T
        # Experts that did not take the patch write past the end, which drops the write.
        into_NB = jnp.where(router.kept_BN.T, place_NB, cache.k.shape[3])
        k, v = put(cache.k, k[:, :, 0], into_NB), put(cache.v, v[:, :, 0], into_NB)
        o = attend_one(q[:, :, 0], k, v, place_NB)[:, :, None]
        y_NB1D = self._out(o, router.weight_BN.T[..., None])
        return self._sum_experts(y_NB1D, x_BD), SMHACache(k, v, router)
