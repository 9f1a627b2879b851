"""The attention core shared by every head, and the dense attention block: the one an SMHA decomposes."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region, run
from uoe_jax.layers.common import (
    Tokens,
    add_bias,
    along_last,
    fold,
    linear,
    mask_empty_segments,
    ones,
    rms_norm,
    rotate,
    scaled_normal,
    tokens_like,
    weight,
    zeros,
)
from uoe_jax.layers.flash import Marks, flash_attention
from uoe_jax.layers.fused import fits_cudnn, fused
from uoe_jax.moe.routing import RoutingStats


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    causal: bool,
    drop_rate: float = 0.0,
    keys_BG: jax.Array | None = None,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention [B,S,H,Dv] over k [B,S,G,Dh], v [B,S,G,Dv] (G divides H), scale 1/sqrt(Dh), softmax in float32.

    On NVIDIA GPUs in 16 bits this is cuDNN's kernel where it takes what is asked (`fits_cudnn`), else `flash_attention`.

    Args:
      segments: int32 [B,S]; a token attends to tokens of its own segment only. None: no restriction.
      causal: a token attends to itself and those before it in the order given.
      drop_rate: dropout of the attention weights, drawn for each row and key head from its key (`group_keys`); None: no dropout.
      lengths: int32 [B], of rows whose last places are empty; what an empty place gives is unspecified, but finite.
    """
    b, s, h, dh = q.shape
    g, dv = v.shape[2:]
    if fits_cudnn(q, v, drop_rate if keys_BG is not None else 0.0):
        return fused(q, k, v, segments, causal, lengths, "cudnn")
    segments = mask_empty_segments(segments, lengths, s)
    # The heads of all rows in front, and the h/g queries of a key head beside each other.
    q_XRSk = q.reshape(b, s, g, h // g, dh).transpose(0, 2, 3, 1, 4).reshape(b * g, h // g, s, dh)
    # In 16 bits a factor that is no power of two rounds every query once more: there it is put on the scores, in float32. (On
    # queries in float32 it costs less, as scores are more.)
    in_queries, on_scores = (dh**-0.5, 1.0) if q.dtype.itemsize == 4 else (1.0, dh**-0.5)
    k_XSk, v_XSv = (a.transpose(0, 2, 1, 3).reshape(b * g, s, a.shape[-1]) for a in (k, v))
    marks = Marks(
        None if segments is None else jnp.repeat(segments, g, axis=0),
        None if keys_BG is None else keys_BG.reshape(-1),
    )
    o_XRSv = flash_attention(q_XRSk * in_queries, k_XSk, v_XSv, marks, causal, drop_rate, on_scores)
    return o_XRSv.reshape(b, g, h // g, s, dv).transpose(0, 3, 1, 2, 4).reshape(b, s, h, dv)


def group_keys(keys_B: jax.Array, g: int, part: int | jax.Array = 0) -> jax.Array:
    """A key for each row and each of g key heads, [B,G]: those of one part of the block, if there are several."""
    return jax.vmap(lambda i: fold(keys_B, i), out_axes=1)(g * part + jnp.arange(g))


def attend_one(q: jax.Array, k: jax.Array, v: jax.Array, last: jax.Array) -> jax.Array:
    """One query [...,H,Dh] of each row over the cached k, v [...,G,S,Dh] at places 0..last (int32 [...]).

    With the places of a head one behind the other a CPU reads a cache where it lies: [S,G,Dh] was 7 to 10 times slower.
    """
    # Not jax.nn.dot_product_attention, which asks CPUs for a product in bf16 or float16 that they do not have (0.10.2).
    *rows, h, dh = q.shape
    g, s = k.shape[-3:-1]
    q_GRk = q.reshape(*rows, g, h // g, dh)
    scores_GRS = (
        jnp.einsum("...grk,...gsk->...grs", q_GRk, k, preferred_element_type=jnp.float32) * dh**-0.5
    )
    seen_S = along_last(jnp.arange(s), scores_GRS) <= last[..., None, None, None]
    weights_GRS = jax.nn.softmax(jnp.where(seen_S, scores_GRS, -1e30))
    o_GRk = jnp.einsum(
        "...grs,...gsk->...grk", weights_GRS.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return o_GRk.reshape(q.shape).astype(q.dtype)


def cache_of(k_BSGk: jax.Array, places: int) -> jax.Array:
    """Keys or values [...,S,G,Dh] as a cache holds them, [...,G,places,Dh]."""
    k_BGSk = k_BSGk.swapaxes(-3, -2)
    return jnp.pad(k_BGSk, (*((0, 0),) * (k_BGSk.ndim - 2), (0, places - k_BGSk.shape[-2]), (0, 0)))


def put(cache_GSk: jax.Array, k_Gk: jax.Array, at: jax.Array) -> jax.Array:
    """A cache [...,G,S,Dh] with the keys or values [...,G,Dh] of one token of each row at its place (int32 [...]); none where
    that is past the end."""
    *rows, g, _ = k_Gk.shape
    grid = jnp.meshgrid(*map(jnp.arange, (*rows, g)), indexing="ij", sparse=True)
    return cache_GSk.at[(*grid, at[..., None])].set(k_Gk, mode="drop", unique_indices=True)


def placed(x: jax.Array, scale: nnx.Param | None, eps: float | None, rotary: Any) -> jax.Array:
    """Queries or keys [...,heads,Dh] ready to be compared: QK-norm where the block has it, then their rotary positions."""
    return rotate(
        x if scale is None or eps is None else rms_norm(x, scale[...], eps).astype(x.dtype), rotary
    )


class DenseCache(NamedTuple):
    """Keys and values [B,G,context,Dh]."""

    k: jax.Array
    v: jax.Array


class Options(TypedDict):
    """Arguments that all attention blocks have in common."""

    bias: bool
    qkv_bias: bool
    causal: bool
    drop_rate: float
    qk_norm_eps: float | None
    dtype: Any
    out_scale: float


def options(c: ModelConfig) -> Options:
    """What every attention block is told of the model's configuration beside its sizes."""
    return Options(
        bias=c.bias,
        qkv_bias=c.qkv_bias,
        causal=c.causal,
        drop_rate=c.attention_dropout,
        qk_norm_eps=c.norm_eps if c.qk_norm else None,
        dtype=c.dtype,
        out_scale=c.out_scale,
    )


class Heads(nnx.Module):
    """The frame of a block whose heads see all tokens: the region around it, and the way out of the heads."""

    dtype: Any
    w_o: nnx.Param
    bias_out: nnx.Param | None

    def __call__(
        self, x_BLD: jax.Array, tokens: Tokens | None = None
    ) -> tuple[jax.Array, RoutingStats | None]:
        """Returns (y_BLD, None: nothing is routed). On a mesh, heads lie on `expert`."""
        graphdef, weights = nnx.split(self)

        def share(
            weights: nnx.State, x_BLD: jax.Array, tokens: Tokens, region: Region
        ) -> tuple[jax.Array, RoutingStats | None]:
            return nnx.merge(graphdef, weights)._forward(x_BLD, tokens, region)[:2]

        return run(
            share,
            weights,
            x_BLD,
            tokens_like(x_BLD) if tokens is None else tokens,
            dtype=self.dtype,
        )

    def _forward(
        self, x_BLD: jax.Array, tokens: Tokens, region: Region = WHOLE
    ) -> tuple[jax.Array, RoutingStats | None, jax.Array, jax.Array]:
        """(y_BLD, statistics where something is routed, and the two arrays that a prefill keeps)."""
        raise NotImplementedError

    def _out(self, o: jax.Array) -> jax.Array:
        return linear(o, self.w_o[...].astype(self.dtype), axes=2)


class Attention(Heads):
    """Multi-head attention with grouped key/value heads; letters in `layers.common`.

    bias: of all projections; qkv_bias: of those into the heads alone.
    qk_norm_eps: RMSNorm over every query and key, with a scale that all heads share (as in Qwen3); None: none.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 0,
        bias: bool = False,
        qkv_bias: bool = False,
        causal: bool = False,
        drop_rate: float = 0.0,
        qk_norm_eps: float | None = None,
        dtype: Any = jnp.float32,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        d, h, g, dh = d_model, n_heads, n_kv_heads or n_heads, d_model // n_heads
        self.causal, self.drop_rate, self.qk_norm_eps, self.dtype = (
            causal,
            drop_rate,
            qk_norm_eps,
            dtype,
        )
        self.w_q = weight(rngs, (d, h, dh), ("embed", "heads", None), scaled_normal(d))
        self.w_k: nnx.Param | None = weight(
            rngs, (d, g, dh), ("embed", "heads", None), scaled_normal(d)
        )
        self.w_v = weight(rngs, (d, g, dh), ("embed", "heads", None), scaled_normal(d))
        self.w_o = weight(rngs, (h, dh, d), ("heads", None, "embed"), scaled_normal(d, out_scale))
        self.b_q = weight(rngs, (h, dh), ("heads", None), zeros) if bias or qkv_bias else None
        self.b_k = weight(rngs, (g, dh), ("heads", None), zeros) if bias or qkv_bias else None
        self.b_v = weight(rngs, (g, dh), ("heads", None), zeros) if bias or qkv_bias else None
        self.q_scale = weight(rngs, (dh,), (None,), ones) if qk_norm_eps else None
        self.k_scale = weight(rngs, (dh,), (None,), ones) if qk_norm_eps else None
        self.bias_out = weight(rngs, (d,), (None,), zeros) if bias else None

    def _forward(
        self, x_BLD: jax.Array, tokens: Tokens, region: Region = WHOLE
    ) -> tuple[jax.Array, RoutingStats | None, jax.Array, jax.Array]:
        shared_BLD, x_BLD = region.gather_inputs(x_BLD.astype(self.dtype))
        q, k, v = self._project(x_BLD, tokens.rotary)
        o = self._mix(q, k, v, x_BLD, tokens, region)
        o, stats = self._weighed(o, shared_BLD, tokens.segments_BL, region)
        return (
            add_bias(
                region.reduce_outputs(self._out(o)), region.weight_for_local_tokens(self.bias_out)
            ),
            stats,
            k,
            v,
        )

    def _weighed(
        self, o: jax.Array, x_BLD: jax.Array, segments_BL: jax.Array | None, region: Region
    ) -> tuple[jax.Array, RoutingStats | None]:
        """The heads' values as they are added up, and statistics where something is routed; x_BLD as all parts have it."""
        return o, None

    def _mix(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        x_BLD: jax.Array,
        tokens: Tokens,
        region: Region,
    ) -> jax.Array:
        """The heads' values [B,L,H,Dh] from queries [B,L,H,Dh], keys and values [B,L,G,Dh], and what they were made of."""
        keys_BG = (
            None
            if tokens.keys_B is None
            else group_keys(tokens.keys_B, k.shape[2], region.shard_index)
        )
        return attend(q, k, v, tokens.segments_BL, self.causal, self.drop_rate, keys_BG)

    def _project(self, x: jax.Array, rotary: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        assert self.w_k is not None  # only Reformer has none, and projects in its own way
        q, k, v = (
            checkpoint_name(add_bias(linear(x, w[...].astype(self.dtype)), b), "qkv")
            for w, b in ((self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v))
        )
        q, k = (
            placed(q, self.q_scale, self.qk_norm_eps, rotary),
            placed(k, self.k_scale, self.qk_norm_eps, rotary),
        )
        return q, k, v

    def prefill(
        self, x_BLD: jax.Array, tokens: Tokens, context: int
    ) -> tuple[jax.Array, DenseCache]:
        """The whole prompt, and its keys and values with room for `context` tokens."""
        y_BLD, _, k, v = self._forward(x_BLD, tokens)
        return y_BLD, DenseCache(cache_of(k, context), cache_of(v, context))

    def decode_step(
        self, x_BD: jax.Array, cache: DenseCache, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, DenseCache]:
        """Token `t_B` of each sequence; rotary tables are [B,Dh/2]."""
        q, k, v = self._project(x_BD.astype(self.dtype), rotary)
        cache = DenseCache(put(cache.k, k, t_B), put(cache.v, v, t_B))
        o, _ = self._weighed(
            attend_one(q, cache.k, cache.v, t_B)[:, None],
            x_BD.astype(self.dtype)[:, None],
            None,
            WHOLE,
        )
        return add_bias(self._out(o[:, 0]), self.bias_out), cache
