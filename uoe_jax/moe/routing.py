"""Routing: logits in, `dispatch.Decision` out (`decide`).

Pure functions; no parameters, no mesh. Letters in `layers.common`; a sequence is a batch row.
"""

from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.fields import divisors
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.moe.dispatch import Decision, Rows


class RoutingStats(NamedTuple):
    """Sums over the rows of a batch (float32), so that microbatches and processes add up."""

    balance: Array  # the Switch balance loss of each row; 1 per row where the load is even
    z: Array  # mean squared logsumexp of each row
    patches: Array  # valid patches
    untouched: Array  # those that no expert took
    entropy: Array  # entropy (nats) of the scores of every valid patch
    chosen_N: Array  # choices made by patches, per expert
    kept_N: Array  # choices that got a slot
    chosen_4: Array  # the same by quarter of the row
    kept_4: Array


def choose_experts(scores_BMN: Array, valid_BM: Array, k: int) -> Array:
    """Expert selection: bool [B,M,N], the top K of each valid patch; the lower index wins a tie."""
    if k == (n := scores_BMN.shape[-1]):
        return jnp.broadcast_to(valid_BM[..., None], scores_BMN.shape)
    _, best_BMK = jax.lax.top_k(jax.lax.stop_gradient(scores_BMN), k)
    chosen_BMN = (best_BMK[..., None] == jnp.arange(n)[None, None, None]).any(axis=-2)
    return chosen_BMN & valid_BM[..., None]


def biased(scores: Array, load_bias_N: Array | None) -> Array:
    """The scores [...,N] that experts are chosen by: those with little load are raised."""
    if load_bias_N is None:
        return scores
    return scores + load_bias_N.reshape((1,) * (scores.ndim - 1) + (-1,))


def rebalanced(load_bias_N: Array, chosen_N: Array, rate: float) -> Array:
    """The load-balancing bias [...,N] after a step with these choices: up where below the mean."""
    return load_bias_N + rate * jnp.sign(chosen_N.mean(axis=-1, keepdims=True) - chosen_N)


def keep_by_position(chosen_BMN: Array, window: int, capacity: int) -> Array:
    """Data selection by position: bool [B,M,N], an expert's first `capacity` choices per window."""
    b, m, n = chosen_BMN.shape
    window = min(window, m)  # or a short row would be padded to a long window
    if capacity >= window:
        return chosen_BMN
    pad = -m % window
    windows = jnp.pad(chosen_BMN, ((0, 0), (0, pad), (0, 0))).reshape(b, -1, window, n)
    place = jnp.cumsum(windows, axis=2, dtype=jnp.int32)
    return (windows & (place <= capacity)).reshape(b, -1, n)[:, :m]


MANY = 1024  # patches from which counting is faster than sorting, but on GPUs (docs/appendix)


def keep_by_score(chosen_BMN: Array, scores_BMN: Array, capacity_B: Array, slots: int) -> Array:
    """Data selection by score: bool [B,M,N], each expert's best `capacity_B` (at most `slots`)."""
    offered_BNM = jnp.where(chosen_BMN, jax.lax.stop_gradient(scores_BMN), -1.0).swapaxes(1, 2)
    counts = offered_BNM.shape[-1] >= MANY and jax.default_backend() != "gpu"
    best = by_counting if counts else by_sorting
    return best(offered_BNM, capacity_B, slots).swapaxes(1, 2)


def by_sorting(offered_BNM: Array, capacity_B: Array, slots: int) -> Array:
    """bool [B,N,M], the `capacity_B` largest non-negative values; the lower index wins a tie."""
    b, n, m = offered_BNM.shape
    best_BNC, patch_BNC = jax.lax.top_k(offered_BNM, slots)
    wins_BNC = (best_BNC >= 0) & (jnp.arange(slots)[None, None] < capacity_B[:, None, None])
    at = jnp.arange(b * n)[:, None], patch_BNC.reshape(b * n, slots)
    kept = jnp.zeros((b * n, m), bool).at[at].set(wins_BNC.reshape(b * n, slots))
    return kept.reshape(b, n, m)


def by_counting(offered_BNM: Array, capacity_B: Array, slots: int) -> Array:
    """`by_sorting` without a sort: counts values to find the smallest kept one, bit by bit."""
    # The bits of non-negative floats are in their order; those of the others are negative.
    bits_BNM = jax.lax.bitcast_convert_type(offered_BNM, jnp.int32)
    wanted_BN1 = jnp.minimum(capacity_B, slots)[:, None, None]

    def lower(i: Array, least_BN1: Array) -> Array:
        higher_BN1 = least_BN1 | (1 << (30 - i))
        reach_BN1 = (bits_BNM >= higher_BN1).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        return jnp.where(reach_BN1 >= wanted_BN1, higher_BN1, least_BN1)

    least_BN1 = jax.lax.fori_loop(0, 31, lower, jnp.zeros_like(bits_BNM[..., :1]))
    above_BNM = bits_BNM > least_BN1
    level_BNM = bits_BNM == least_BN1
    left_BN1 = wanted_BN1 - above_BNM.sum(axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BNM | (level_BNM & (jnp.cumsum(level_BNM, axis=-1, dtype=jnp.int32) <= left_BN1))


def rescaled(scores: Array, chosen: Array, total: float = 1.0) -> Array:
    """The scores [...,N] of the chosen experts, rescaled to sum to `total`; 0 for the others."""
    kept = jnp.where(chosen, scores, 0)
    return total * kept / jnp.maximum(kept.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def gate(name: str, logits_BMN: Array, scores_BMN: Array, chosen_BMN: Array, k: int) -> Array:
    """Combine weights float32 [B,M,N]; every gate is 1 where all logits are 0."""
    if name == "sigmoid":
        return 2 * jax.nn.sigmoid(logits_BMN)
    if name == "normalized":
        return rescaled(scores_BMN, chosen_BMN, k)
    if name == "score":
        return scores_BMN.shape[-1] * scores_BMN
    if name == "straight_through":
        return 1 + (scores_BMN - jax.lax.stop_gradient(scores_BMN))
    return jnp.ones_like(scores_BMN)  # "none"


class RoutingRule(NamedTuple):
    """What a router makes of its logits [...,N]: `UNION` for unions, another for each baseline."""

    log_shares: Callable[[Array], Array]  # log of scores that sum to 1, for balance and entropy
    scores: Callable[[Array], Array]  # scores that rank experts, and tokens for an expert
    choose: Callable[[Array, Array, int], Array]  # (ranked [B,M,N], valid [B,M], K) -> bool
    weigh: Callable[[RoutingConfig, Array, Array, Array], Array]  # (…, logits, scores, chosen)


UNION = RoutingRule(
    log_shares=jax.nn.log_softmax,
    scores=jax.nn.softmax,
    choose=choose_experts,
    weigh=lambda r, logits, scores, chosen: gate(r.gate, logits, scores, chosen, r.k),
)


def bound_sequences(chosen_BN: Array, scores_BN: Array, group: int, capacity: int) -> Rows:
    """For each expert at most `capacity` of every `group` consecutive rows, the best scores."""
    b, n = chosen_BN.shape
    if b % group:
        rows = f"the {b} rows of the batch: {divisors(b)}"
        raise ValueError(f"sequence_group={group} must divide {rows}")
    offered_BN = jnp.where(chosen_BN, jax.lax.stop_gradient(scores_BN), -1.0)
    best, member = jax.lax.top_k(offered_BN.T.reshape(n, b // group, group), capacity)
    member = jnp.sort(jnp.where(best >= 0, member, group), axis=-1)  # in order, unused rows last
    first = group * jnp.arange(b // group, dtype=jnp.int32)[None, :, None]
    sequence_NR = jnp.where(member < group, member + first, b).reshape(n, -1)
    r = sequence_NR.shape[1]
    at, rows_1R = (jnp.arange(n)[:, None], sequence_NR), jnp.arange(r, dtype=jnp.int32)[None]
    row_of_NB = jnp.full((n, b), r, jnp.int32).at[at].set(rows_1R, mode="drop")
    return jnp.where(sequence_NR < b, sequence_NR, 0), row_of_NB.T


def decide(
    logits_BMN: Array | None,  # float32, of the patches' router; None with unit="sequence"
    valid_BM: Array,  # bool, False for patches of padding only, which never take a slot
    routing: RoutingConfig,
    sequence_logits_BN: Array | None = None,  # of the sequences' router; None with unit="patch"
    load_bias_N: Array | None = None,  # to choose experts only (loss-free balancing, DeepSeek-V3)
    keys_B: Array | None = None,  # in training; None: no noise and no `sequence_capacity_factor`
    rule: RoutingRule = UNION,
) -> tuple[Decision, RoutingStats]:
    """Decides which experts take each patch, and the combine weights.

    A row depends on others only under `sequence_capacity_factor`, in training.

    Raises:
      ValueError: `sequence_group` does not divide B.
    """
    r, own, asking_BM = routing, logits_BMN, valid_BM
    if sequence_logits_BN is not None:  # all patches follow their row: [B,1,N] chooses
        own, asking_BM = sequence_logits_BN[:, None], valid_BM.any(axis=1, keepdims=True)
    assert own is not None  # `layers.router.Router` has the routers that the unit asks for
    patch_logits_BMN = None if own is logits_BMN else logits_BMN  # unit="hierarchical"
    own_scores = ranked = scores_BMN = rule.scores(own)
    if keys_B is not None and r.router_noise:
        draw = jax.vmap(lambda key: jax.random.normal(key, own.shape[1:], jnp.float32))
        ranked = rule.scores(own + r.router_noise * draw(keys_B))
    chosen_BMN = rule.choose(biased(ranked, load_bias_N), asking_BM, r.k) & valid_BM[..., None]
    weights_BMN = rule.weigh(r, own, own_scores, chosen_BMN)
    if patch_logits_BMN is not None:
        patch_scores_BMN = rule.scores(patch_logits_BMN)
        scores_BMN = own_scores * patch_scores_BMN
        weights_BMN *= rule.weigh(r, patch_logits_BMN, patch_scores_BMN, chosen_BMN)
    rows, offered_BMN = None, chosen_BMN
    if r.sequence_capacity_factor and keys_B is not None:
        asked_BN, group = chosen_BMN.any(axis=1), r.sequence_group
        rows = bound_sequences(asked_BN, own_scores[:, 0], group, r.sequence_capacity())
        offered_BMN = chosen_BMN & (rows[1] < rows[0].shape[1])[:, None]
    kept_BMN = _keep(offered_BMN, scores_BMN, valid_BM, r)
    stats = statistics(own, chosen_BMN, kept_BMN, valid_BM, rule)
    if patch_logits_BMN is not None:  # the z-loss is of both routers, the load of the rows' choice
        stats = stats._replace(z=stats.z + _z(patch_logits_BMN, valid_BM).sum())
    weights_BMN = jnp.broadcast_to(weights_BMN, kept_BMN.shape)
    return Decision(kept_BMN, weights_BMN, r.slots(valid_BM.shape[1]), rows), stats


def _keep(offered_BMN: Array, scores_BMN: Array, valid_BM: Array, r: RoutingConfig) -> Array:
    """Data selection: bool [B,M,N], the offered patches that get a slot."""
    if r.priority == "position":
        return keep_by_position(offered_BMN, r.capacity_window, r.window_capacity())
    # Capacity follows the row's own number of valid patches; the table keeps that exact.
    m = valid_BM.shape[1]
    table = np.array([r.window_capacity(i) if i else 0 for i in range(m + 1)], np.int32)
    scores_BMN = jnp.broadcast_to(scores_BMN, offered_BMN.shape)
    capacity_B = jnp.asarray(table)[valid_BM.sum(axis=1)]
    return keep_by_score(offered_BMN, scores_BMN, capacity_B, r.slots(m))


def _z(logits_BMN: Array, valid_BM: Array) -> Array:
    """Mean squared logsumexp over the valid patches of each row, [B]."""
    z_BM = jnp.where(valid_BM, jnp.square(jax.nn.logsumexp(logits_BMN, axis=-1)), 0)
    return z_BM.sum(axis=1) / jnp.maximum(valid_BM.sum(axis=1, dtype=jnp.float32), 1)


def statistics(
    logits: Array, chosen_BMN: Array, kept_BMN: Array, valid_BM: Array, rule: RoutingRule = UNION
) -> RoutingStats:
    """Sums over a batch; logits [B,M,N], or [B,1,N] where all patches of a row have the same."""
    m, n = chosen_BMN.shape[1:]
    log_shares = rule.log_shares(logits)
    shares = jnp.exp(log_shares)
    choices_B1 = jnp.maximum(chosen_BMN.sum(axis=(1, 2), dtype=jnp.float32), 1)[:, None]
    share_BN = chosen_BMN.sum(axis=1, dtype=jnp.float32) / choices_B1
    share_BN = checkpoint_name(share_BN, "selection")  # all that the gradient needs of the choice
    valid_f32_BM = valid_BM.astype(jnp.float32)
    count_B = jnp.maximum(valid_BM.sum(axis=1), 1).astype(jnp.float32)
    mean_share_BN = (shares * valid_f32_BM[..., None]).sum(axis=1) / count_B[:, None]
    entropy_BM = -(shares * log_shares).sum(-1) * valid_f32_BM
    quarter_4M = (jnp.arange(m)[None] * 4 // m == jnp.arange(4)[:, None]).astype(jnp.float32)

    def by_expert(mask_BMN: Array) -> Array:
        return mask_BMN.sum(axis=(0, 1)).astype(jnp.float32)

    def by_quarter(mask_BMN: Array) -> Array:
        by_position_M = mask_BMN.sum(axis=(0, 2)).astype(jnp.float32)
        return jnp.matmul(quarter_4M, by_position_M, precision=jax.lax.Precision.HIGHEST)

    return RoutingStats(
        balance=n * (share_BN * mean_share_BN).sum(),
        z=_z(logits, valid_BM).sum(),
        patches=valid_BM.sum().astype(jnp.float32),
        untouched=(valid_BM & ~kept_BMN.any(axis=-1)).sum().astype(jnp.float32),
        entropy=jax.lax.stop_gradient(entropy_BM.sum()),
        chosen_N=by_expert(chosen_BMN),
        kept_N=by_expert(kept_BMN),
        chosen_4=by_quarter(chosen_BMN),
        kept_4=by_quarter(kept_BMN),
    )
