"""FlashAttention (Dao et al. 2022, arXiv 2205.14135) in plain XLA operations.

Scores exist one tile at a time, forward and backward. Tiles behind a causal mask are not computed.
The backward pass keeps the output and each query's log-sum-exp, and recomputes the tiles.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.layers import tiles
from uoe_jax.layers.common import dropout, fold, pad_sequence

MASKED = -1e30  # the score of a key that a query may not attend to
Pair = tuple[Any, Any]  # tile of queries, tile of keys


class Tiling(NamedTuple):
    """What is static of a call; hashable, so that its compilation is found again."""

    causal: bool  # a token attends to itself and those before it
    side: int  # tokens of a tile
    length: int  # of a row; padding fills up its last tile
    drop_rate: float  # dropout of the attention weights
    scale: float  # of the scores


class Masks(NamedTuple):
    segments_AS: Array | None  # int32, a token attends to its own segment only
    keys_A: Array | None  # of dropout


def flash_attention(
    q: Array, k: Array, v: Array, masks: Masks, causal: bool, drop_rate: float, scale: float
) -> Array:
    """softmax(scale·q·kᵀ)·v in the dtype of q [A,Q,S,k] over k [A,S,k] and v [A,S,e]: [A,Q,S,e].

    Computed in float32. Every query must attend to something, such as itself.
    """
    s, drop_rate = q.shape[2], 0.0 if masks.keys_A is None else drop_rate
    tiling = Tiling(causal, tiles.tile(s), s, drop_rate, scale)
    more = -s % tiling.side
    qkv = (pad_sequence(a, more, axis=-2) for a in (q, k, v))
    if masks.segments_AS is not None:
        masks = masks._replace(segments_AS=pad_sequence(masks.segments_AS, more))
    return _attention(*qkv, masks, tiling)[:, :, :s]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, masks, tiling):
    return _forward(q, k, v, masks, tiling)[0]


def _forward(q, k, v, masks, tiling):
    def add(sums: tuple[Array, ...], pair: Pair) -> tuple[Array, ...]:  # rescaled to a new largest
        o, top, total = (_part(a, pair[0], tiling, 2) for a in sums)
        scores = _scores(q, k, masks, tiling, pair)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weight, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        dropped = _dropped(weight, masks, tiling, pair).astype(v.dtype)
        mixed = _product("aqts,ase->aqte", dropped, _part(v, pair[1], tiling, 1))
        new = o * shrink[..., None] + mixed, new_top, total * shrink + weight.sum(axis=-1)
        return tuple(_put(a, b, pair[0], tiling, 2) for a, b in zip(sums, new))

    rows = q.shape[:3]
    # Made like q, sums vary over the same axes of a mesh as what is added to them.
    zero = jnp.zeros_like(q, jnp.float32, shape=rows)
    start = jnp.zeros_like(q, jnp.float32, shape=(*rows, v.shape[-1])), zero + MASKED, zero
    o, top, total = _over_pairs(add, start, tiling)
    o = checkpoint_name((o / total[..., None]).astype(q.dtype), "heads")
    log_total = checkpoint_name(top + jnp.log(total), "heads")
    return o, (q, k, v, masks, o, log_total)


def _backward(tiling, kept, d_o):
    q, k, v, masks, o, log_total = kept
    # As a product: a sum over so few values was 12 times as slow on CPUs.
    exact: Any = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    shift = jnp.einsum("aqte,aqte->aqt", d_o, o, **exact)

    def add(sums: tuple[Array, ...], pair: Pair) -> tuple[Array, ...]:
        i, j = pair
        q_t, d_t, shift_t, log_t = (_part(a, i, tiling, 2) for a in (q, d_o, shift, log_total))
        k_s, v_s = (_part(a, j, tiling, 1) for a in (k, v))
        weight = jnp.exp(_scores(q, k, masks, tiling, pair) - log_t[..., None])
        dropped = _dropped(weight, masks, tiling, pair).astype(v.dtype)
        d_weight = _dropped(_product("aqte,ase->aqts", d_t, v_s), masks, tiling, pair)
        d_scores = (weight * (d_weight - shift_t[..., None])).astype(q.dtype)
        # The scale goes on the sums: on 16-bit values it would make small ones of float16 zero.
        new = (
            _product("aqts,ask->aqtk", d_scores, k_s) * tiling.scale,
            _product("aqts,aqtk->ask", d_scores, q_t) * tiling.scale,
            _product("aqts,aqte->ase", dropped, d_t),
        )
        return tuple(
            _put(a, _part(a, at, tiling, axis) + b, at, tiling, axis)
            for a, b, (at, axis) in zip(sums, new, ((i, 2), (j, 1), (j, 1)))
        )

    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (q, k, v))
    found = _over_pairs(add, zeros, tiling)
    return *(a.astype(b.dtype) for a, b in zip(found, (q, k, v))), None


_attention.defvjp(_forward, _backward)


def _over_pairs(add: Callable[[Any, Pair], Any], start: Any, tiling: Tiling) -> Any:
    """Every tile in turn; a row of one tile needs no loop."""
    pairs = tiles.pairs(tiling.length, tiling.causal)
    if len(pairs) == 1:
        return add(start, pairs[0])
    step = lambda sums, pair: (add(sums, (pair[0], pair[1])), None)  # noqa: E731
    return jax.lax.scan(step, start, np.array(pairs, np.int32))[0]


def _scores(q: Array, k: Array, masks: Masks, tiling: Tiling, pair: Pair) -> Array:
    """float32 [A,Q,t,t], MASKED where a query may not attend."""
    q_t, k_s = _part(q, pair[0], tiling, 2), _part(k, pair[1], tiling, 1)
    scores = _product("aqtk,ask->aqts", q_t, k_s) * tiling.scale
    query_t, key_t = (at * tiling.side + jnp.arange(tiling.side) for at in pair)
    query_t1, key_1t, allowed = query_t[:, None], key_t[None], None
    if tiling.causal:
        allowed = (key_1t <= query_t1)[None]
    elif tiling.length % tiling.side:
        allowed = (key_1t < tiling.length)[None]
    if masks.segments_AS is not None:
        query_At, key_At = (_part(masks.segments_AS, at, tiling, 1) for at in pair)
        same = query_At[:, :, None] == key_At[:, None]
        allowed = same if allowed is None else same & allowed
    return scores if allowed is None else jnp.where(allowed[:, None], scores, MASKED)


def _dropped(weight: Array, masks: Masks, tiling: Tiling, pair: Pair) -> Array:
    """Dropout of a tile's weights, or of their gradient: the same forward and backward."""
    if not tiling.drop_rate or masks.keys_A is None:
        return weight
    tile = pair[0] * -(-tiling.length // tiling.side) + pair[1]
    return dropout(weight, tiling.drop_rate, fold(masks.keys_A, tile))


def _product(subscripts: str, a: Array, b: Array) -> Array:
    """A batched product over A, summed in float32; `subscripts` are those of an einsum."""
    # Q and the tokens of a tile are merged in one axis: a plain batched matmul is fastest on CPUs.
    x, q, t = a.shape[:3]
    flat = [o.reshape(x, q * t, o.shape[-1]) if o.ndim == 4 else o for o in (a, b)]
    y = jnp.einsum(subscripts.replace("q", ""), *flat, preferred_element_type=jnp.float32)
    return y.reshape(x, q, t, -1) if "q" in subscripts.split("->")[1] else y


def _part(a: Array, i: Any, tiling: Tiling, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, i * tiling.side, tiling.side, axis)


def _put(a: Array, part: Array, i: Any, tiling: Tiling, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part, i * tiling.side, axis)
