"""The attention core of every head, and the dense attention block: the one an SMHA decomposes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region
from uoe_jax.layers import common
from uoe_jax.layers.common import Block, Outputs, Step, Tokens, add_bias, linear
from uoe_jax.layers.flash import Masks, flash_attention
from uoe_jax.layers.fused import fits_cudnn, fused
from uoe_jax.layers.weights import ones, scaled_normal, weight, weight_if, zeros
from uoe_jax.moe.routing import RoutingStats


def attend(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,  # int32 [R,S]; a token attends to its own segment only
    causal: bool,  # a token attends to itself and those before it in the order given
    drop_rate: float = 0.0,  # dropout of the attention weights, where there are keys for it
    keys_RG: Array | None = None,  # a random key for each row and key/value head (`group_keys`)
    lengths: Array | None = None,  # int32 [R], the filled places of each row; the others come last
) -> Array:
    """Softmax attention [R,S,H,e] over k [R,S,G,k] and v [R,S,G,e], scale 1/sqrt(k).

    Softmax in float32. On NVIDIA GPUs in 16 bits this is cuDNN's kernel where it takes the shapes
    (`fits_cudnn`), else `flash_attention`. Nothing attends to empty places; their output is
    unspecified, and a kernel may leave NaN there.
    """
    r, s, h, dh = q.shape
    g, dv = v.shape[2:]
    if fits_cudnn(q, v, drop_rate if keys_RG is not None else 0.0):
        return fused(q, k, v, segments, causal, lengths, "cudnn")
    segments = common.mask_empty_segments(segments, lengths, s)
    q_AQSk = q.reshape(r, s, g, h // g, dh).transpose(0, 2, 3, 1, 4).reshape(r * g, h // g, s, dh)
    k_ASk, v_ASe = (a.transpose(0, 2, 1, 3).reshape(r * g, s, a.shape[-1]) for a in (k, v))
    # In 16 bits a scale that is no power of two would round the queries again: there it goes on the
    # float32 scores. In float32 it goes on the queries, which are fewer.
    q_scale, scale = (dh**-0.5, 1.0) if q.dtype.itemsize == 4 else (1.0, dh**-0.5)
    segments_AS = None if segments is None else jnp.repeat(segments, g, axis=0)
    masks = Masks(segments_AS, None if keys_RG is None else keys_RG.reshape(-1))
    o_AQSe = flash_attention(q_AQSk * q_scale, k_ASk, v_ASe, masks, causal, drop_rate, scale)
    return o_AQSe.reshape(r, g, h // g, s, dv).transpose(0, 3, 1, 2, 4).reshape(r, s, h, dv)


def group_keys(keys_B: Array | None, g: int, shard: int | Array = 0) -> Array | None:
    """A key for each row and each of the g key/value heads of a shard, [B,G]; None: None."""
    if keys_B is None:
        return None
    return jax.vmap(lambda i: common.fold(keys_B, i), out_axes=1)(g * shard + jnp.arange(g))


def attend_one(q: Array, k: Array, v: Array, last: Array) -> Array:
    """One query [...,H,k] of each row over the cached k, v [...,G,S,k] at places 0..last [...]."""
    # A CPU reads this cache layout in order: [S,G,k] was 7 to 10 times slower.
    # Not jax.nn.dot_product_attention: it asks CPUs for 16-bit products they do not have (0.10.2).
    *rows, h, dh = q.shape
    g, s = k.shape[-3:-1]
    q_GQk, f32 = q.reshape(*rows, g, h // g, dh), jnp.float32
    scores_GQS = jnp.einsum("...gqk,...gsk->...gqs", q_GQk, k, preferred_element_type=f32)
    seen_S = common.along_last(jnp.arange(s), scores_GQS) <= last[..., None, None, None]
    weights_GQS = jax.nn.softmax(jnp.where(seen_S, scores_GQS * dh**-0.5, -1e30)).astype(v.dtype)
    o_GQk = jnp.einsum("...gqs,...gsk->...gqk", weights_GQS, v, preferred_element_type=f32)
    return o_GQk.reshape(q.shape).astype(q.dtype)


def cache_of(k_SGk: Array, places: int) -> Array:
    """Keys or values [...,S,G,k] as a cache holds them, [...,G,places,k]."""
    return common.pad_sequence(k_SGk.swapaxes(-3, -2), places - k_SGk.shape[-3], axis=-2)


def put(cache_GSk: Array, k_Gk: Array, at: Array) -> Array:
    """A cache [...,G,S,k] with a token's keys or values [...,G,k] at each row's place [...]."""
    # A place past the end writes nothing.
    *rows, g, _ = k_Gk.shape
    grid = jnp.meshgrid(*map(jnp.arange, (*rows, g)), indexing="ij", sparse=True)
    return cache_GSk.at[(*grid, at[..., None])].set(k_Gk, mode="drop", unique_indices=True)


def placed(block: Any, q: Array, k: Array, rotary: Any) -> tuple[Array, Array]:
    """Queries and keys [...,heads,k] after the block's QK-norm, if any, and rotary positions."""
    if (eps := block.qk_norm_eps) is not None:
        q = common.rms_norm(q, block.q_scale[...], eps).astype(q.dtype)
        k = common.rms_norm(k, block.k_scale[...], eps).astype(k.dtype)
    return common.rotate(q, rotary), common.rotate(k, rotary)


class DenseCache(NamedTuple):
    k: Array  # [B,G,context,k]
    v: Array


def options(c: ModelConfig) -> dict[str, Any]:
    """Keyword arguments that all attention blocks have in common."""
    weights = dict(n_kv_heads=c.kv_heads, bias=c.bias, qkv_bias=c.qkv_bias, out_scale=c.out_scale)
    eps = c.norm_eps if c.qk_norm else None
    core = dict(causal=c.causal, drop_rate=c.attention_dropout, qk_norm_eps=eps, dtype=c.dtype)
    return weights | core


class Attention(Block):
    """Multi-head attention with grouped key/value heads. On a mesh, heads are over `expert`."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 0,
        bias: bool = False,  # of all projections
        qkv_bias: bool = False,  # of queries, keys and values alone
        causal: bool = False,
        drop_rate: float = 0.0,
        qk_norm_eps: float | None = None,  # QK-norm with one scale for all heads; None: none
        dtype: Any = jnp.float32,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        d, h, g, dh = d_model, n_heads, n_kv_heads or n_heads, d_model // n_heads
        self.causal, self.dtype = causal, dtype
        self.drop_rate, self.qk_norm_eps = drop_rate, qk_norm_eps
        into, biased = ("embed", "heads", None), bias or qkv_bias
        self.w_q = weight(rngs, (d, h, dh), into, scaled_normal(d))
        self.w_k: nnx.Param | None = weight(rngs, (d, g, dh), into, scaled_normal(d))
        self.w_v = weight(rngs, (d, g, dh), into, scaled_normal(d))
        self.w_o = weight(rngs, (h, dh, d), ("heads", None, "embed"), scaled_normal(d, out_scale))
        self.b_q = weight_if(biased, rngs, (h, dh), ("heads", None), zeros)
        self.b_k = weight_if(biased, rngs, (g, dh), ("heads", None), zeros)
        self.b_v = weight_if(biased, rngs, (g, dh), ("heads", None), zeros)
        self.q_scale = weight_if(qk_norm_eps, rngs, (dh,), (None,), ones)
        self.k_scale = weight_if(qk_norm_eps, rngs, (dh,), (None,), ones)
        self.bias_out = weight_if(bias, rngs, (d,), (None,), zeros)

    def _forward(self, x_BLD: Array, tokens: Tokens, region: Region = WHOLE) -> Outputs:
        shared_BLD, x_BLD = region.gather_inputs(x_BLD.astype(self.dtype))
        q, k, v = self._project(x_BLD, tokens.rotary)
        o = self._mix(q, k, v, x_BLD, tokens, region)
        o, stats = self._weighed(o, shared_BLD, tokens.segments_BL, region)
        y_BLD = region.reduce_outputs(self._out(o))
        return add_bias(y_BLD, region.weight_for_local_tokens(self.bias_out)), stats, (k, v)

    def _weighed(
        self, o: Array, x_BLD: Array, segments_BL: Array | None, region: Region
    ) -> tuple[Array, RoutingStats | None]:
        """The heads' values as they are summed; statistics where heads are routed."""
        return o, None

    def _mix(
        self, q: Array, k: Array, v: Array, x_BLD: Array, tokens: Tokens, region: Region
    ) -> Array:
        """The heads' values [B,L,H,k] from q [B,L,H,k], k and v [B,L,G,k] and the block's input."""
        keys_BG = group_keys(tokens.keys_B, k.shape[2], region.shard_index)
        return attend(q, k, v, tokens.segments_BL, self.causal, self.drop_rate, keys_BG)

    def _project(self, x: Array, rotary: Any) -> tuple[Array, Array, Array]:
        assert self.w_k is not None  # only Reformer has none, and overrides this
        weights = (self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v)
        q, k, v = (self._heads(x, w, b) for w, b in weights)
        return *placed(self, q, k, rotary), v

    def _heads(self, x: Array, w: nnx.Param, b: nnx.Param | None) -> Array:
        return checkpoint_name(add_bias(linear(x, w[...].astype(self.dtype)), b), "qkv")

    def _out(self, o: Array) -> Array:
        return linear(o, self.w_o[...].astype(self.dtype), axes=2)

    def _start_cache(self, state: Any, tokens: Tokens, context: int) -> DenseCache:
        return DenseCache(*(cache_of(a, context) for a in state))

    def decode_step(self, x_BD: Array, cache: DenseCache, t_B: Array, rotary: Any) -> Step:
        x_BD = x_BD.astype(self.dtype)
        q, k, v = self._project(x_BD, rotary)
        cache = DenseCache(put(cache.k, k, t_B), put(cache.v, v, t_B))
        o = attend_one(q, cache.k, cache.v, t_B)
        o, _ = self._weighed(o[:, None], x_BD[:, None], None, WHOLE)
        return add_bias(self._out(o[:, 0]), self.bias_out), cache
