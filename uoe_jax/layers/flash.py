"""Attention one tile of scores at a time, in plain XLA operations: FlashAttention (Dao et al. 2022, arXiv 2205.14135).

What is held beside queries, keys and values is one tile for every head, forward and backward, so that memory grows with the
length of a row and not with its square. Tiles behind a causal mask are not computed. The backward pass keeps the result and
the logarithm of each query's sum, and makes the tiles again.

Letters: X key heads of all rows, R queries heads that share one, S tokens, t tokens of a tile, k, v widths.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.layers import tiles
from uoe_jax.layers.common import dropout, fold

HIDDEN = -1e30  # the score of what a query may not attend to
Pair = tuple[Any, Any]  # tile of queries, tile of keys


class Rule(NamedTuple):
    """What a tile must know beside its queries and keys; hashable, so that a compilation is found again.

    Attributes:
      causal: a token attends to itself and those before it.
      side: tokens of a tile. length: of a row; the tokens behind it fill up the last tile.
      drop_rate: dropout of the attention weights. scale: of the scores.
    """

    causal: bool
    side: int
    length: int
    drop_rate: float
    scale: float


class Marks(NamedTuple):
    """segments_XS: int32, a token attends to its own segment only; keys_X: random keys of dropout; None: neither."""

    segments_XS: jax.Array | None
    keys_X: jax.Array | None


def flash_attention(
    q_XRSk: jax.Array,
    k_XSk: jax.Array,
    v_XSv: jax.Array,
    marks: Marks,
    causal: bool,
    drop_rate: float = 0.0,
    scale: float = 1.0,
) -> jax.Array:
    """softmax(scale·q·kᵀ)·v in the dtype of the queries, [X,R,S,v]; sums, scale and softmax in float32.

    Every query must be allowed to attend to something: under a causal mask and in a segment it attends to itself.
    """
    s = q_XRSk.shape[2]
    rule = Rule(causal, tiles.tile(s), s, drop_rate if marks.keys_X is not None else 0.0, scale)
    more = -s % rule.side
    if more:
        q_XRSk, k_XSk, v_XSv = (
            jnp.pad(a, (*((0, 0),) * (a.ndim - 2), (0, more), (0, 0)))
            for a in (q_XRSk, k_XSk, v_XSv)
        )
        if marks.segments_XS is not None:
            marks = marks._replace(segments_XS=jnp.pad(marks.segments_XS, ((0, 0), (0, more))))
    return _attention(q_XRSk, k_XSk, v_XSv, marks, rule)[:, :, :s]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    q_XRSk: jax.Array, k_XSk: jax.Array, v_XSv: jax.Array, marks: Marks, rule: Rule
) -> jax.Array:
    return _forward(q_XRSk, k_XSk, v_XSv, marks, rule)[0]


def _forward(q, k, v, marks, rule):
    def add(sums: tuple[jax.Array, ...], pair: Pair) -> tuple[jax.Array, ...]:
        """The tile's share, and the sums so far at the new largest score."""
        o, top, total = (_part(a, pair[0], rule, 2) for a in sums)
        scores = _scores(q, k, marks, rule, pair)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weight, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        mixed = _product(
            "xrts,xsv->xrtv",
            _dropped(weight, marks, rule, pair).astype(v.dtype),
            _part(v, pair[1], rule, 1),
        )
        new = o * shrink[..., None] + mixed, new_top, total * shrink + weight.sum(axis=-1)
        return tuple(_put(a, b, pair[0], rule, 2) for a, b in zip(sums, new))

    rows = q.shape[:3]
    # Made like q, sums vary over the same axes of a mesh as what is added to them.
    zero = jnp.zeros_like(q, jnp.float32, shape=rows)
    start = jnp.zeros_like(q, jnp.float32, shape=(*rows, v.shape[-1])), zero + HIDDEN, zero
    o, top, total = _over_pairs(add, start, rule)
    o = checkpoint_name((o / total[..., None]).astype(q.dtype), "heads")
    log_total = checkpoint_name(top + jnp.log(total), "heads")
    return o, (q, k, v, marks, o, log_total)


def _backward(rule, kept, d_o):
    q, k, v, marks, o, log_total = kept
    # As a product: a sum over so few values was 12 times as slow on CPUs.
    shift = jnp.einsum(
        "xrtv,xrtv->xrt",
        d_o,
        o,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )

    def add(sums: tuple[jax.Array, ...], pair: Pair) -> tuple[jax.Array, ...]:
        i, j = pair
        q_t, d_t, shift_t, log_t = (_part(a, i, rule, 2) for a in (q, d_o, shift, log_total))
        k_s, v_s = (_part(a, j, rule, 1) for a in (k, v))
        weight = jnp.exp(_scores(q, k, marks, rule, pair) - log_t[..., None])
        d_v = _product("xrts,xrtv->xsv", _dropped(weight, marks, rule, pair).astype(v.dtype), d_t)
        d_weight = _dropped(_product("xrtv,xsv->xrts", d_t, v_s), marks, rule, pair)
        d_scores = (weight * (d_weight - shift_t[..., None])).astype(q.dtype)
        # The scale goes on the sums: on what is rounded to 16 bits it would push small values of float16 below its least one.
        d_q, d_k = (
            _product("xrts,xsk->xrtk", d_scores, k_s),
            _product("xrts,xrtk->xsk", d_scores, q_t),
        )
        new = d_q * rule.scale, d_k * rule.scale, d_v
        places = ((i, 2), (j, 1), (j, 1))
        return tuple(
            _put(a, _part(a, at, rule, axis) + b, at, rule, axis)
            for a, b, (at, axis) in zip(sums, new, places)
        )

    zeros = tuple(jnp.zeros_like(a, jnp.float32) for a in (q, k, v))
    found = _over_pairs(add, zeros, rule)
    return (*(a.astype(b.dtype) for a, b in zip(found, (q, k, v))), None)


_attention.defvjp(_forward, _backward)


def _over_pairs(add: Callable[[Any, Pair], Any], start: Any, rule: Rule) -> Any:
    """Every tile in turn; a row of one tile needs no loop."""
    pairs = tiles.pairs(rule.length, rule.causal)
    if len(pairs) == 1:
        return add(start, pairs[0])
    return jax.lax.scan(
        lambda sums, pair: (add(sums, (pair[0], pair[1])), None), start, np.array(pairs, np.int32)
    )[0]


def _scores(q: jax.Array, k: jax.Array, marks: Marks, rule: Rule, pair: Pair) -> jax.Array:
    """float32 [X,R,t,t], HIDDEN where a query may not attend."""
    scores = (
        _product("xrtk,xsk->xrts", _part(q, pair[0], rule, 2), _part(k, pair[1], rule, 1))
        * rule.scale
    )
    query_t1, key_1t = (at * rule.side + jnp.arange(rule.side) for at in pair)
    query_t1, key_1t = query_t1[:, None], key_1t[None]
    allowed = None
    if rule.causal:
        allowed = (key_1t <= query_t1)[None]
    elif rule.length % rule.side:
        allowed = (key_1t < rule.length)[None]
    if marks.segments_XS is not None:
        query_Xt, key_Xt = (_part(marks.segments_XS, at, rule, 1) for at in pair)
        same = query_Xt[:, :, None] == key_Xt[:, None]
        allowed = same if allowed is None else same & allowed
    return scores if allowed is None else jnp.where(allowed[:, None], scores, HIDDEN)


def _dropped(weight: jax.Array, marks: Marks, rule: Rule, pair: Pair) -> jax.Array:
    """Weights, or their gradient, after the dropout of a tile: the same forward and backward."""
    if not rule.drop_rate or marks.keys_X is None:
        return weight
    tile = pair[0] * -(-rule.length // rule.side) + pair[1]
    return dropout(weight, rule.drop_rate, fold(marks.keys_X, tile))


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A batched product of one operand with X, R and tokens by one with X and tokens, summed in float32.

    R and the tokens of a tile are one axis of it: a plain batched product, the form that runs fastest on CPUs.
    """
    x, r, t = a.shape[:3]
    folded = subscripts.replace("r", "")
    flat = [o.reshape(x, r * t, o.shape[-1]) if o.ndim == 4 else o for o in (a, b)]
    y = jnp.einsum(folded, *flat, preferred_element_type=jnp.float32)
    return y.reshape(x, r, t, -1) if "r" in subscripts.split("->")[1] else y


def _part(a: jax.Array, i: Any, rule: Rule, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, i * rule.side, rule.side, axis)


def _put(a: jax.Array, part: jax.Array, i: Any, rule: Rule, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part, i * rule.side, axis)
