"""Routing: scores in, `Selection` out. Pure functions; no parameters, no mesh.

Letters: B sequences, M patches per sequence, N experts, K chosen per patch, C slots per expert and sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.config import RoutingConfig


class Selection(NamedTuple):
    """Which patches each expert works on.

    Attributes:
      slots_NBC: int32, the patch in each slot, ascending; an empty slot holds 0 and comes after the filled ones.
      valid_NBC: bool, whether the slot is filled.
      weights_NBC: float32 combine weight, 0 in empty slots.
      slot_of_BMN: int32, the inverse: the slot a patch has in each expert, C where the expert did not take it.
    """

    slots_NBC: jax.Array
    valid_NBC: jax.Array
    weights_NBC: jax.Array
    slot_of_BMN: jax.Array

    @property
    def kept_BMN(self) -> jax.Array:
        """bool, whether an expert took a patch."""
        return self.slot_of_BMN < self.slots_NBC.shape[-1]


class RoutingStats(NamedTuple):
    """Sums over the sequences of a batch (float32), so that microbatches and hosts add up.

    Attributes:
      balance: Switch balance loss of each sequence, summed; 1 per sequence where the load is even.
      z: mean squared logsumexp of each sequence, summed.
      patches: valid patches. untouched: those that no expert took.
      entropy: entropy (nats) of the scores of every valid patch, summed.
      chosen_N, kept_N: choices made by patches and choices that got a slot, per expert.
      chosen_4, kept_4: the same by quarter of the row.
    """

    balance: jax.Array
    z: jax.Array
    patches: jax.Array
    untouched: jax.Array
    entropy: jax.Array
    chosen_N: jax.Array
    kept_N: jax.Array
    chosen_4: jax.Array
    kept_4: jax.Array


def choose_experts(scores_BMN: jax.Array, valid_BM: jax.Array, k: int) -> jax.Array:
    """Expert selection: bool [B,M,N], the K best scores of each valid patch; the lower index wins a tie."""
    n = scores_BMN.shape[-1]
    if k == n:
        return jnp.broadcast_to(valid_BM[..., None], scores_BMN.shape)
    _, best_BMK = jax.lax.top_k(jax.lax.stop_gradient(scores_BMN), k)
    return (best_BMK[..., None] == jnp.arange(n)[None, None, None]).any(axis=-2) & valid_BM[..., None]


def biased(scores: jax.Array, load_bias_N: jax.Array | None) -> jax.Array:
    """What experts are chosen by: scores [...,N], shifted towards experts with little load."""
    return scores if load_bias_N is None else scores + load_bias_N.reshape((1,) * (scores.ndim - 1) + (-1,))


def rebalanced(load_bias_N: jax.Array, chosen_N: jax.Array, rate: float) -> jax.Array:
    """The bias after a step in which experts were chosen `chosen_N` times (leading axes alike): up where below the mean."""
    return load_bias_N + rate * jnp.sign(chosen_N.mean(axis=-1, keepdims=True) - chosen_N)


def first_come(chosen_BMN: jax.Array, window: int, capacity: int) -> jax.Array:
    """Data selection by position: bool [B,M,N], the first `capacity` choices of an expert in every window of patches."""
    b, m, n = chosen_BMN.shape
    if capacity >= min(window, m):
        return chosen_BMN
    pad = -m % window
    windows = jnp.pad(chosen_BMN, ((0, 0), (0, pad), (0, 0))).reshape(b, -1, window, n)
    place = jnp.cumsum(windows, axis=2, dtype=jnp.int32)
    return (windows & (place <= capacity)).reshape(b, -1, n)[:, :m]


def best_first(chosen_BMN: jax.Array, scores_BMN: jax.Array, capacity_B: jax.Array, slots: int) -> jax.Array:
    """Data selection by score: bool [B,M,N], the `capacity_B` (at most `slots`) best-scored choices of each expert."""
    b, m, n = chosen_BMN.shape
    offered_BNM = jnp.where(chosen_BMN, jax.lax.stop_gradient(scores_BMN), -1.0).swapaxes(1, 2)
    best_BNM, patch_BNC = jax.lax.top_k(offered_BNM, slots)
    wins_BNC = (best_BNM >= 0) & (jnp.arange(slots)[None, None] < capacity_B[:, None, None])
    rows = jnp.arange(b * n)[:, None]
    kept = jnp.zeros((b * n, m), bool).at[rows, patch_BNC.reshape(b * n, slots)].set(wins_BNC.reshape(b * n, slots))
    return kept.reshape(b, n, m).swapaxes(1, 2)


def gate(name: str, logits_BMN: jax.Array, scores_BMN: jax.Array, chosen_BMN: jax.Array, k: int) -> jax.Array:
    """Combine weights float32 [B,M,N]; each gate gives 1 where the router is undecided."""
    if name == "sigmoid":
        return 2 * jax.nn.sigmoid(logits_BMN)
    if name == "normalized":
        kept = jnp.where(chosen_BMN, scores_BMN, 0)
        return k * kept / jnp.maximum(kept.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    if name == "score":
        return scores_BMN.shape[-1] * scores_BMN
    if name == "straight_through":
        return 1 + (scores_BMN - jax.lax.stop_gradient(scores_BMN))
    return jnp.ones_like(scores_BMN)  # "none"


def select(
    logits_BMN: jax.Array | None,
    valid_BM: jax.Array,
    routing: RoutingConfig,
    sequence_logits_BN: jax.Array | None = None,
    load_bias_N: jax.Array | None = None,
) -> tuple[Selection, RoutingStats]:
    """Routes every patch of every sequence; sequences do not see each other.

    Args:
      logits_BMN: float32 logits of the patches' router; None with unit="sequence", which has none.
      valid_BM: bool, False for patches of padding only; they never take a slot.
      routing: N, K, unit, capacity, priority and gate.
      sequence_logits_BN: float32 logits of the sequences' router, where the unit is not the patch.
      load_bias_N: added to the scores where experts are chosen, and nowhere else (loss-free balancing, DeepSeek-V3).
    """
    m, k = valid_BM.shape[1], routing.k
    own = logits_BMN  # the logits of whoever chooses experts
    if routing.unit != "patch":
        shape = (*valid_BM.shape, sequence_logits_BN.shape[-1])
        own = jnp.broadcast_to(sequence_logits_BN[:, None], shape)
    own_scores_BMN = scores_BMN = jax.nn.softmax(own, axis=-1)
    chosen_BMN = choose_experts(biased(own_scores_BMN, load_bias_N), valid_BM, k)
    weights_BMN = gate(routing.gate, own, own_scores_BMN, chosen_BMN, k)
    if routing.unit == "hierarchical":
        patch_scores_BMN = jax.nn.softmax(logits_BMN, axis=-1)
        scores_BMN = own_scores_BMN * patch_scores_BMN
        weights_BMN = weights_BMN * gate(routing.gate, logits_BMN, patch_scores_BMN, chosen_BMN, k)
    c = routing.slots(m)
    if routing.priority == "position":
        kept_BMN = first_come(chosen_BMN, routing.capacity_window, routing.window_capacity())
    else:
        # Capacity follows the sequence's own number of valid patches; the table keeps that exact.
        table = np.array([routing.window_capacity(i) if i else 0 for i in range(m + 1)], np.int32)
        kept_BMN = best_first(chosen_BMN, scores_BMN, jnp.asarray(table)[valid_BM.sum(axis=1)], c)
    stats = _stats(own, own_scores_BMN, chosen_BMN, kept_BMN, valid_BM, k)
    if routing.unit == "hierarchical":  # both routers' logits are kept small; the load is the sequences' choice alone
        stats = stats._replace(z=stats.z + _z(logits_BMN, valid_BM).sum())
    return _pack(kept_BMN, weights_BMN, c), stats


def _pack(kept_BMN: jax.Array, weights_BMN: jax.Array, c: int) -> Selection:
    """Numbers the kept patches of each expert in ascending order and lists them by slot."""
    b, m, n = kept_BMN.shape
    slot_of_BMN = jnp.where(kept_BMN, jnp.cumsum(kept_BMN, axis=1, dtype=jnp.int32) - 1, c)
    filled_NB = kept_BMN.sum(axis=1, dtype=jnp.int32).T
    valid_NBC = jnp.arange(c)[None, None] < filled_NB[..., None]
    # Every kept patch writes its own slot; the others write past the end and are dropped.
    rows_BMN = jnp.arange(n)[None, None] * b + jnp.arange(b)[:, None, None]
    patch_BMN = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[None, :, None], (b, m, n))
    slots = jnp.zeros((n * b, c), jnp.int32).at[rows_BMN, slot_of_BMN].set(patch_BMN, mode="drop")
    slots_NBC = slots.reshape(n, b, c)
    return Selection(slots_NBC, valid_NBC, _to_slots(weights_BMN, slots_NBC, valid_NBC, slot_of_BMN), slot_of_BMN)


@jax.custom_vjp
def _to_slots(w_BMN: jax.Array, slots_NBC: jax.Array, valid_NBC: jax.Array, slot_of_BMN: jax.Array) -> jax.Array:
    """Weights by slot [N,B,C]; gathers in both directions, where autodiff would scatter."""
    return jnp.where(valid_NBC, jnp.take_along_axis(jnp.transpose(w_BMN, (2, 0, 1)), slots_NBC, axis=-1), 0)


def _to_slots_fwd(w_BMN, slots_NBC, valid_NBC, slot_of_BMN):
    return _to_slots(w_BMN, slots_NBC, valid_NBC, slot_of_BMN), slot_of_BMN


def _to_slots_bwd(slot_of_BMN, d_NBC):
    slot_NBM = jnp.transpose(slot_of_BMN, (2, 0, 1))
    return jnp.transpose(_at_slot(d_NBC, slot_NBM), (1, 2, 0)), None, None, None


def _at_slot(values_NBC: jax.Array, slot_NBM: jax.Array) -> jax.Array:
    c = values_NBC.shape[-1]
    return jnp.where(slot_NBM < c, jnp.take_along_axis(values_NBC, jnp.minimum(slot_NBM, c - 1), axis=-1), 0)


_to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


def _z(logits_BMN: jax.Array, valid_BM: jax.Array) -> jax.Array:
    """Mean squared logsumexp over the valid patches of each sequence, [B]."""
    z_BM = jnp.where(valid_BM, jnp.square(jax.nn.logsumexp(logits_BMN, axis=-1)), 0)
    return z_BM.sum(axis=1) / jnp.maximum(valid_BM.sum(axis=1, dtype=jnp.float32), 1)


def _stats(logits_BMN, scores_BMN, chosen_BMN, kept_BMN, valid_BM, k: int) -> RoutingStats:
    n, m = logits_BMN.shape[-1], logits_BMN.shape[1]
    count_B = jnp.maximum(valid_BM.sum(axis=1), 1).astype(jnp.float32)
    share_BN = chosen_BMN.sum(axis=1, dtype=jnp.float32) / (count_B[:, None] * k)
    valid_f32_BM = valid_BM.astype(jnp.float32)
    mean_score_BN = (scores_BMN * valid_f32_BM[..., None]).sum(axis=1) / count_B[:, None]
    entropy_BM = -(scores_BMN * jax.nn.log_softmax(logits_BMN, axis=-1)).sum(-1) * valid_f32_BM
    quarter_4M = (jnp.arange(m)[None] * 4 // m == jnp.arange(4)[:, None]).astype(jnp.float32)

    def sums(mask_BMN):
        return mask_BMN.sum(axis=(0, 1)).astype(jnp.float32), quarter_4M @ mask_BMN.sum(axis=(0, 2)).astype(jnp.float32)

    chosen_N, chosen_4 = sums(chosen_BMN)
    kept_N, kept_4 = sums(kept_BMN)
    return RoutingStats(
        balance=n * (share_BN * mean_score_BN).sum(),
        z=_z(logits_BMN, valid_BM).sum(),
        patches=valid_BM.sum().astype(jnp.float32),
        untouched=(valid_BM & ~kept_BMN.any(axis=-1)).sum().astype(jnp.float32),
        entropy=jax.lax.stop_gradient(entropy_BM.sum()),
        chosen_N=chosen_N,
        kept_N=kept_N,
        chosen_4=chosen_4,
        kept_4=kept_4,
    )
