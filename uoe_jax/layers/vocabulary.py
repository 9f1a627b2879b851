"""Embedding lookup, logits and loss of a vocabulary in one table.

A vocabulary is sharded over `expert` where the axis divides it. Then every shard looks up the ids
it holds, one reduction combines them, and scores stay sharded over the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.manual import Region, run
from uoe_jax.layers.chunked import chunked_nll, chunked_sums

Result = tuple[Array, None]  # of a shard: its activations, no sums


def lookup(table: nnx.Param, ids_BL: Array, dtype: Any) -> Array:
    """Rows of a table [V,D] at ids, [B,L,D] in `dtype`, sharded as between blocks."""
    # Looked up in float32 and then rounded: a row's gradient sums over all places of its id, and a
    # running sum in 16 bits stops growing for frequent entries.
    whole = table.shape[0]

    def on_shard(table: nnx.Param, ids_BL: Array, _: Any, region: Region) -> Result:
        table_vD = table[...].astype(jnp.float32)
        v = table_vD.shape[0]
        if v == whole:
            return table_vD[region.local_tokens(ids_BL)].astype(dtype), None
        own_BL = ids_BL - v * region.shard_index
        held_BL = (own_BL >= 0) & (own_BL < v)
        x_BLD = table_vD[jnp.where(held_BL, own_BL, 0)].astype(dtype)
        return region.reduce_outputs(jnp.where(held_BL[..., None], x_BLD, 0)), None

    sharded = mesh_lib.is_sharded(table.logical_axes[0], whole)
    return run(on_shard, table, ids_BL, dtype=dtype, ids=True, on_local_tokens=not sharded)[0]


def vocabulary_scores(head: nnx.Param, tied: bool, x_BLD: Array) -> Array:
    """float32 logits [B,L,V] of all tokens; head [D,V], or (tied) the embedding [V,D]."""
    sharded = mesh_lib.is_sharded("vocab", head.shape[0 if tied else 1])

    def on_shard(head: nnx.Param, x_BLD: Array, _: Any, region: Region) -> Result:
        x_BLD = region.gather_inputs(x_BLD)[1] if sharded else x_BLD
        kernel_Dv = (head[...].T if tied else head[...]).astype(x_BLD.dtype)
        return jnp.matmul(x_BLD, kernel_Dv, preferred_element_type=jnp.float32), None

    how: dict[str, Any] = dict(dtype=x_BLD.dtype, shard_last=sharded, on_local_tokens=not sharded)
    return run(on_shard, head, x_BLD, **how)[0]


def vocabulary_nll(head: nnx.Param, tied: bool, x_BLD: Array, targets_BL: Array) -> Array:
    """-log softmax(logits) at the targets, float32 [B,L], sharded as between blocks."""
    # The logits of all tokens never exist. Over a sharded vocabulary every shard sums its own
    # entries, and three numbers a token cross `expert`.
    sharded = mesh_lib.is_sharded("vocab", head.shape[0 if tied else 1])

    def on_shard(head: nnx.Param, x_BLD: Array, targets_BL: Array, region: Region) -> Result:
        kernel_vD = head[...] if tied else head[...].T
        x_BLD = region.gather_inputs(x_BLD)[1] if sharded else x_BLD
        target_T = (targets_BL if sharded else region.local_tokens(targets_BL)).reshape(-1)
        n, x_TD = target_T.shape[0], x_BLD.reshape(-1, x_BLD.shape[-1])
        if not sharded:
            return chunked_nll(x_TD, kernel_vD, target_T, 0, n).reshape(x_BLD.shape[:2]), None
        own_T = region.as_varying(target_T) - kernel_vD.shape[0] * region.shard_index
        log_sum_T, hit_T = chunked_sums(x_TD, kernel_vD, own_T, 0, n)
        top_T = jax.lax.pmax(jax.lax.stop_gradient(log_sum_T), "expert")
        total_T, hit_T = jax.lax.psum((jnp.exp(log_sum_T - top_T), hit_T), "expert")
        nll_BL = (jnp.log(total_T) + top_T - hit_T).reshape(x_BLD.shape[:2])
        return region.local_tokens(nll_BL), None

    how: dict[str, Any] = dict(dtype=x_BLD.dtype, on_local_tokens=not sharded)
    return run(on_shard, head, x_BLD, targets_BL, **how)[0]
