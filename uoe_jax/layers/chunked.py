"""Vocabulary losses a chunk of tokens at a time, forward and backward.

The backward pass recomputes the scores: one more matmul of the head for memory that does not grow
with tokens x vocabulary. T counts one device's tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array

from uoe_jax.layers import tiles

Bound = Array | int  # a position among the tokens
_rows, _put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim


def chunked_nll(x_Td: Array, table_vd: Array, target_T: Array, start: Bound, stop: Bound) -> Array:
    """-log softmax(x · table) at the targets of tokens start … stop-1, 0 elsewhere; float32 [T]."""
    log_sum_T, hit_T = chunked_sums(x_Td, table_vd, target_T, start, stop)
    return log_sum_T - hit_T


@jax.custom_vjp
def chunked_sums(
    x_Td: Array, table_vd: Array, target_T: Array, start: Bound, stop: Bound
) -> tuple[Array, Array]:
    """(log-sum-exp of the scores, the target's score) of tokens start … stop-1; float32 [T].

    Zeros for other tokens, and a score of 0 for a target that is not in the table. Differentiable
    in x and table. Products are in the dtype of x; the table's gradient is summed in float32.
    """
    return _forward(x_Td, table_vd, target_T, start, stop)[0]


def entry_scores(x: Array, table_vd: Array) -> Array:
    """float32 scores [...,v] of hidden states [...,d] against the entries of a table."""
    return jnp.matmul(x, table_vd.T, preferred_element_type=jnp.float32)


def _forward(x_Td, table_vd, target_T, start, stop):
    kernel_vd, n = table_vd.astype(x_Td.dtype), x_Td.shape[0]
    size = tiles.chunk(n, table_vd.shape[0])

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        at, own_t = _chunk(i, size, n, start, stop)
        x_td, target_t, log_sum_t, hit_t = (_rows(a, at, size) for a in (x_Td, target_T, *sums))
        scores_tv = entry_scores(x_td, kernel_vd)
        new_hit_t = jnp.where(_hits(target_t, scores_tv), scores_tv, 0).sum(axis=-1)
        log_sum_t = jnp.where(own_t, jax.nn.logsumexp(scores_tv, axis=-1), log_sum_t)
        hit_t = jnp.where(own_t, new_hit_t, hit_t)
        return _put(sums[0], log_sum_t, at, 0), _put(sums[1], hit_t, at, 0)

    # Made like x, sums vary over the same axes of a mesh as what is added to them.
    zero_T = jnp.zeros_like(x_Td, jnp.float32, shape=(n,))
    log_sum_T, hit_T = jax.lax.fori_loop(0, -((start - stop) // size), add, (zero_T, zero_T))
    return (log_sum_T, hit_T), (x_Td, table_vd, target_T, start, stop, log_sum_T)


def _backward(kept, d):
    x_Td, table_vd, target_T, start, stop, log_sum_T = kept
    kernel_vd, n = table_vd.astype(x_Td.dtype), x_Td.shape[0]
    size = tiles.chunk(n, table_vd.shape[0])
    # A token's share of a mean loss is too small for float16: scaled so that the largest is 1.
    largest = jnp.maximum(jnp.abs(d[0]).max(), jnp.abs(d[1]).max())
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        at, own_t = _chunk(i, size, n, start, stop)
        x_td, target_t, log_sum_t = (_rows(a, at, size) for a in (x_Td, target_T, log_sum_T))
        d_log_sum_t, d_hit_t = (_rows(a / scale, at, size) for a in d)
        dx_td = _rows(sums[0], at, size)
        scores_tv = entry_scores(x_td, kernel_vd)
        d_tv = jnp.exp(scores_tv - log_sum_t[:, None]) * d_log_sum_t[:, None]
        d_tv += jnp.where(_hits(target_t, scores_tv), d_hit_t[:, None], 0)
        d_tv = jnp.where(own_t[:, None], d_tv, 0).astype(x_td.dtype)
        dx_td += jnp.matmul(d_tv, kernel_vd, preferred_element_type=jnp.float32)
        d_table_vd = sums[1] + jnp.matmul(d_tv.T, x_td, preferred_element_type=jnp.float32)
        return _put(sums[0], dx_td, at, 0), d_table_vd

    zeros = tuple(jnp.zeros_like(x_Td, jnp.float32, shape=a.shape) for a in (x_Td, table_vd))
    sums = jax.lax.fori_loop(0, -((start - stop) // size), add, zeros)
    dx, d_table = ((scale * a).astype(like.dtype) for a, like in zip(sums, (x_Td, table_vd)))
    return dx, d_table, None, None, None


chunked_sums.defvjp(_forward, _backward)


def _chunk(i: Array, size: int, n: int, start: Bound, stop: Bound) -> tuple[Array, Array]:
    """(start of chunk i, bool [t] which of its tokens are its own): the last one may overlap."""
    first = start + i * size
    at = jnp.minimum(first, n - size)
    token_t = at + jnp.arange(size, dtype=jnp.int32)
    return at, (token_t >= first) & (token_t < stop)


def _hits(target_t: Array, scores_tv: Array) -> Array:
    return jnp.arange(scores_tv.shape[-1], dtype=jnp.int32)[None] == target_t[:, None]
