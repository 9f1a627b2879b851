"""Losses of a vocabulary without the scores of all tokens: a chunk of tokens at a time, forward and backward.

The backward pass makes the scores again, one more product of the head for memory that does not grow with tokens x words.

Letters: n tokens of one device, c tokens of a chunk, d width, v words of the table.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uoe_jax.layers import tiles


def words_nll(
    x_nd: jax.Array,
    table_vd: jax.Array,
    target_n: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> jax.Array:
    """-log softmax(x · table) at the targets of tokens start … stop-1, 0 for the others; float32 [n]."""
    log_sum_n, hit_n = words_sums(x_nd, table_vd, target_n, start, stop)
    return log_sum_n - hit_n


@jax.custom_vjp
def words_sums(
    x_nd: jax.Array,
    table_vd: jax.Array,
    target_n: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """(log of the sum of exp(scores), the target's score, or 0 where it is no word of the table) of tokens start … stop-1,
    zeros for the others; float32 [n].

    Differentiable in x and table; the work is that of stop - start tokens. Products are computed in the dtype of x, and the
    gradient of the table is added up in float32.
    """
    return _forward(x_nd, table_vd, target_n, start, stop)[0]


def word_scores(x: jax.Array, table_vd: jax.Array) -> jax.Array:
    """float32 scores [...,v] of states [...,d]."""
    return jnp.matmul(x, table_vd.T, preferred_element_type=jnp.float32)


def _forward(x_nd, table_vd, target_n, start, stop):
    kernel_vd, n = table_vd.astype(x_nd.dtype), x_nd.shape[0]
    size = tiles.chunk(n, table_vd.shape[0])

    def add(k: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, mine_c = _chunk(k, size, n, start, stop)
        x_cd, target_c, log_sum_c, hit_c = (_rows(a, at, size) for a in (x_nd, target_n, *sums))
        scores_cv = word_scores(x_cd, kernel_vd)
        new_hit_c = jnp.where(_hits(target_c, scores_cv), scores_cv, 0).sum(axis=-1)
        new = (
            jnp.where(mine_c, jax.nn.logsumexp(scores_cv, axis=-1), log_sum_c),
            jnp.where(mine_c, new_hit_c, hit_c),
        )
        log_sum_n, hit_n = (
            jax.lax.dynamic_update_slice_in_dim(a, b, at, axis=0) for a, b in zip(sums, new)
        )
        return log_sum_n, hit_n

    # Made like x, sums vary over the same axes of a mesh as what is added to them.
    zero_n = jnp.zeros_like(x_nd, jnp.float32, shape=(n,))
    log_sum_n, hit_n = jax.lax.fori_loop(0, -((start - stop) // size), add, (zero_n, zero_n))
    return (log_sum_n, hit_n), (x_nd, table_vd, target_n, start, stop, log_sum_n)


def _backward(kept, d):
    x_nd, table_vd, target_n, start, stop, log_sum_n = kept
    kernel_vd, n = table_vd.astype(x_nd.dtype), x_nd.shape[0]
    size = tiles.chunk(n, table_vd.shape[0])
    # A token's share of a mean loss is too small for float16: the largest is 1 in the products.
    scale = jnp.maximum(
        jnp.maximum(jnp.abs(d[0]).max(), jnp.abs(d[1]).max()), jnp.finfo(jnp.float32).tiny
    )

    def add(k: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        at, mine_c = _chunk(k, size, n, start, stop)
        of_tokens = (x_nd, target_n, log_sum_n, d[0] / scale, d[1] / scale, sums[0])
        x_cd, target_c, log_sum_c, d_log_sum_c, d_hit_c, dx_cd = (
            _rows(a, at, size) for a in of_tokens
        )
        scores_cv = word_scores(x_cd, kernel_vd)
        d_cv = jnp.exp(scores_cv - log_sum_c[:, None]) * d_log_sum_c[:, None]
        d_cv += jnp.where(_hits(target_c, scores_cv), d_hit_c[:, None], 0)
        d_cv = jnp.where(mine_c[:, None], d_cv, 0).astype(x_cd.dtype)
        dx_cd += jnp.matmul(d_cv, kernel_vd, preferred_element_type=jnp.float32)
        d_table_vd = sums[1] + jnp.matmul(d_cv.T, x_cd, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(sums[0], dx_cd, at, axis=0), d_table_vd

    zeros = tuple(jnp.zeros_like(x_nd, jnp.float32, shape=a.shape) for a in (x_nd, table_vd))
    dx_nd, d_table_vd = jax.lax.fori_loop(0, -((start - stop) // size), add, zeros)
    return (
        (scale * dx_nd).astype(x_nd.dtype),
        (scale * d_table_vd).astype(table_vd.dtype),
        None,
        None,
        None,
    )


words_sums.defvjp(_forward, _backward)


def _chunk(
    k: jax.Array, size: int, n: int, start: jax.Array | int, stop: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """(where chunk k begins, bool [c] which of its tokens are its own): one that would end past n begins earlier."""
    first = start + k * size
    at = jnp.minimum(first, n - size)
    token_c = at + jnp.arange(size, dtype=jnp.int32)
    return at, (token_c >= first) & (token_c < stop)


def _rows(a: jax.Array, at: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, at, size, axis=0)


def _hits(target_c: jax.Array, scores_cv: jax.Array) -> jax.Array:
    return jnp.arange(scores_cv.shape[-1], dtype=jnp.int32)[None] == target_c[:, None]
