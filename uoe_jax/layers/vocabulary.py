"""What is before and after the blocks: tables that are looked up, and the scores of a vocabulary.

A vocabulary lies on `expert` where the axis divides it. Then every part looks up the ids it has and the reduction that
ends a block puts them together; scores stay cut over the vocabulary, and no device ever holds all of them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.manual import Region, run
from uoe_jax.layers.chunked import words_nll, words_sums


def lookup(table: nnx.Param, ids_BL: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table [V,D] at ids, [B,L,D] in `dtype`, as activations lie between blocks.

    They are looked up in float32 and then rounded: a row's gradient is the sum over all places of its id, and a sum that is
    rounded to 16 bits after each of them stands still for frequent words.
    """
    whole = table.shape[0]

    def share(
        table: nnx.Param, ids_BL: jax.Array, _: None, region: Region
    ) -> tuple[jax.Array, None]:
        table_vD = table[...].astype(jnp.float32)
        v = table_vD.shape[0]
        if v == whole:
            return table_vD[region.local_tokens(ids_BL)].astype(dtype), None
        own_BL = ids_BL - v * region.shard_index
        here_BL = (own_BL >= 0) & (own_BL < v)
        found_BLD = table_vD[jnp.where(here_BL, own_BL, 0)].astype(dtype)
        return region.reduce_outputs(jnp.where(here_BL[..., None], found_BLD, 0)), None

    cut = mesh_lib.is_cut(table.logical_axes[0], whole)
    return run(share, table, ids_BL, dtype=dtype, enters=False, on_local_tokens=not cut)[0]


def vocabulary_scores(head: nnx.Param, tied: bool, x_BLD: jax.Array) -> jax.Array:
    """float32 scores [B,L,V] of every token's state; head [D,V], or (tied) the embedding [V,D]."""
    axis = 0 if tied else 1
    cut = mesh_lib.is_cut("vocab", head.shape[axis])

    def share(head: nnx.Param, x_BLD: jax.Array, _: None, region: Region) -> tuple[jax.Array, None]:
        x_BLD = region.gather_inputs(x_BLD)[1] if cut else x_BLD
        kernel_DV = head[...].T if tied else head[...]
        return jnp.matmul(
            x_BLD, kernel_DV.astype(x_BLD.dtype), preferred_element_type=jnp.float32
        ), None

    return run(share, head, x_BLD, dtype=x_BLD.dtype, cut_last=cut, on_local_tokens=not cut)[0]


def vocabulary_nll(
    head: nnx.Param, tied: bool, x_BLD: jax.Array, targets_BL: jax.Array
) -> jax.Array:
    """-log softmax(scores) at the targets, float32 [B,L] as activations lie between blocks; never the scores of all tokens.

    Over a cut vocabulary every part sums its own words, and what crosses `expert` are three numbers a token.
    """
    axis = 0 if tied else 1
    cut = mesh_lib.is_cut("vocab", head.shape[axis])

    def share(
        head: nnx.Param, x_BLD: jax.Array, targets_BL: jax.Array, region: Region
    ) -> tuple[jax.Array, None]:
        kernel_vD = head[...] if tied else head[...].T
        x_BLD = region.gather_inputs(x_BLD)[1] if cut else x_BLD
        target_n = (targets_BL if cut else region.local_tokens(targets_BL)).reshape(-1)
        n, x_nD = target_n.shape[0], x_BLD.reshape(-1, x_BLD.shape[-1])
        if not cut:
            return words_nll(x_nD, kernel_vD, target_n, 0, n).reshape(x_BLD.shape[:2]), None
        own_n = region.as_varying(target_n) - kernel_vD.shape[0] * region.shard_index
        log_sum_n, hit_n = words_sums(x_nD, kernel_vD, own_n, 0, n)
        top_n = jax.lax.pmax(jax.lax.stop_gradient(log_sum_n), "expert")
        total_n, hit_n = jax.lax.psum((jnp.exp(log_sum_n - top_n), hit_n), "expert")
        nll_BL = (jnp.log(total_n) + top_n - hit_n).reshape(x_BLD.shape[:2])
        return region.local_tokens(nll_BL), None

    return run(share, head, x_BLD, targets_BL, dtype=x_BLD.dtype, on_local_tokens=not cut)[0]
