"""Routing: logits in, `Decision` out (`decide`); its `pack` lists it by slot as a `Selection`.

Pure functions; no parameters, no mesh. Letters in `layers.common`; a sequence is a batch row.
"""

import functools
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.fields import divisors
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.moe.dispatch import Selection, pack


class RoutingStats(NamedTuple):
    """Sums over the rows of a batch (float32), so that microbatches and processes add up.

    Attributes:
      balance: Switch balance loss of each row, summed; 1 per row where the load is even.
      z: mean squared logsumexp of each row, summed.
      patches: valid patches. untouched: those that no expert took.
      entropy: entropy (nats) of the scores of every valid patch, summed.
      chosen_N, kept_N: choices made by patches and choices that got a slot, per expert.
      chosen_4, kept_4: the same by quarter of the row.
    """

    balance: Array
    z: Array
    patches: Array
    untouched: Array
    entropy: Array
    chosen_N: Array
    kept_N: Array
    chosen_4: Array
    kept_4: Array


def choose_experts(scores_BMN: Array, valid_BM: Array, k: int) -> Array:
    """Expert selection: bool [B,M,N], the top K of each valid patch; the lower index wins a tie."""
    n = scores_BMN.shape[-1]
    if k == n:
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
    """The load-balancing bias after a step with `chosen_N` choices: up where below the mean.

    Leading axes, of both alike, are layers.
    """
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
    """Data selection by score: bool [B,M,N], the `capacity_B` best choices of each expert.

    At most `slots`; the lower index wins a tie.
    """
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
    """What a router makes of its logits [...,N]: `UNION` for unions, another for each baseline.

    Attributes:
      log_shares: logits -> log of scores that sum to 1, for the balance loss and the entropy.
      scores: logits -> scores that rank experts, and tokens for an expert.
      choose: (ranked [B,M,N], valid [B,M], K) -> bool [B,M,N].
      weigh: (routing, logits, scores, chosen) -> combine weights float32 [B,M,N].
    """

    log_shares: Callable[[Array], Array]
    scores: Callable[[Array], Array]
    choose: Callable[[Array, Array, int], Array]
    weigh: Callable[[RoutingConfig, Array, Array, Array], Array]


UNION = RoutingRule(
    log_shares=jax.nn.log_softmax,
    scores=jax.nn.softmax,
    choose=choose_experts,
    weigh=lambda r, logits, scores, chosen: gate(r.gate, logits, scores, chosen, r.k),
)


def bound_sequences(
    chosen_BN: Array, scores_BN: Array, group: int, capacity: int
) -> tuple[Array, Array]:
    """For each expert at most `capacity` of every `group` consecutive rows, the best scores.

    Returns:
      (sequence_NR, row_of_BN) of a `Selection`, R = capacity·B/group rows an expert.
    """
    b, n = chosen_BN.shape
    if b % group:
        fits = f"must divide the {b} rows of the batch: {divisors(b)}"
        raise ValueError(f"sequence_group={group} {fits}")
    offered_BN = jnp.where(chosen_BN, jax.lax.stop_gradient(scores_BN), -1.0)
    best, member = jax.lax.top_k(offered_BN.T.reshape(n, b // group, group), capacity)
    member = jnp.sort(jnp.where(best >= 0, member, group), axis=-1)  # in order, unused rows last
    first = group * jnp.arange(b // group, dtype=jnp.int32)[None, :, None]
    sequence_NR = jnp.where(member < group, member + first, b).reshape(n, -1)
    r = sequence_NR.shape[1]
    at, rows_1R = (jnp.arange(n)[:, None], sequence_NR), jnp.arange(r, dtype=jnp.int32)[None]
    row_of_NB = jnp.full((n, b), r, jnp.int32).at[at].set(rows_1R, mode="drop")
    return jnp.where(sequence_NR < b, sequence_NR, 0), row_of_NB.T


class Decision(NamedTuple):
    """Who takes what, before it is listed by slot.

    Attributes:
      kept_BMN: bool, whether an expert takes a patch; at most `slots` of a row for each expert.
      weights_BMN: float32 combine weight of every patch in every expert.
      slots: C, static.
      rows: (sequence_NR, row_of_BN) of a `Selection` under `sequence_capacity_factor`; None: all.
    """

    kept_BMN: Array
    weights_BMN: Array
    slots: int
    rows: tuple[Array, Array] | None

    def pack(self) -> Selection:
        """The slots of every expert."""
        return pack(self.kept_BMN, self.weights_BMN, self.slots, self.rows)

    def of_experts(self, first: Array | int, n: int) -> "Decision":
        """The decision of the experts [first, first + n)."""
        own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=n)
        rows = None if self.rows is None else (own(self.rows[0], axis=0), own(self.rows[1], axis=1))
        return Decision(own(self.kept_BMN, axis=2), own(self.weights_BMN, axis=2), self.slots, rows)


def decide(
    logits_BMN: Array | None,
    valid_BM: Array,
    routing: RoutingConfig,
    sequence_logits_BN: Array | None = None,
    load_bias_N: Array | None = None,
    keys_B: Array | None = None,
    rule: RoutingRule = UNION,
) -> tuple[Decision, RoutingStats]:
    """Decides which experts take each patch, and the combine weights.

    A row depends on others only under `sequence_capacity_factor`, in training.

    Args:
      logits_BMN: float32 logits of the patches' router; None with unit="sequence".
      valid_BM: bool, False for patches of padding only; they never take a slot.
      routing: N, K, unit, capacity, priority and gate.
      sequence_logits_BN: float32 logits of the sequences' router; None with unit="patch".
      load_bias_N: added to the scores for choosing experts only (loss-free balancing, DeepSeek-V3).
      keys_B: in training, a key per row for router noise; None: evaluation, without noise and
        without `sequence_capacity_factor`.
      rule: what logits mean.

    Raises:
      ValueError: `sequence_group` does not divide B.
    """
    m, r = valid_BM.shape[1], routing
    # Of whoever chooses experts: [B,M,N], or [B,1,N] where all patches follow their row.
    if r.unit == "patch":
        own, asking = _given(logits_BMN), valid_BM
    else:
        own, asking = _given(sequence_logits_BN)[:, None], valid_BM.any(axis=1, keepdims=True)
    own_scores = scores_BMN = rule.scores(own)
    ranked = biased(_noisy(own, own_scores, r, keys_B, rule), load_bias_N)
    chosen_BMN = rule.choose(ranked, asking, r.k) & valid_BM[..., None]
    weights_BMN = rule.weigh(r, own, own_scores, chosen_BMN)
    if r.unit == "hierarchical":
        patch_logits_BMN = _given(logits_BMN)
        patch_scores_BMN = rule.scores(patch_logits_BMN)
        scores_BMN = own_scores * patch_scores_BMN
        patch_weights_BMN = rule.weigh(r, patch_logits_BMN, patch_scores_BMN, chosen_BMN)
        weights_BMN = weights_BMN * patch_weights_BMN
    rows, offered_BMN = None, chosen_BMN
    if r.sequence_capacity_factor and keys_B is not None:
        asked_BN, group = chosen_BMN.any(axis=1), r.sequence_group
        rows = bound_sequences(asked_BN, own_scores[:, 0], group, r.sequence_capacity())
        offered_BMN = chosen_BMN & (rows[1] < rows[0].shape[1])[:, None]
    kept_BMN = _keep(offered_BMN, scores_BMN, valid_BM, r)
    stats = statistics(own, chosen_BMN, kept_BMN, valid_BM, rule)
    if (
        r.unit == "hierarchical"
    ):  # the z-loss is of both routers, the load of the rows' choice alone
        stats = stats._replace(z=stats.z + _z(_given(logits_BMN), valid_BM).sum())
    return Decision(
        kept_BMN, jnp.broadcast_to(weights_BMN, kept_BMN.shape), r.slots(m), rows
    ), stats


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


def _given(logits: Array | None) -> Array:
    """Logits that the unit asks for; `layers.router.Router` has their router then."""
    assert logits is not None
    return logits


def _noisy(
    logits: Array, scores: Array, r: RoutingConfig, keys_B: Array | None, rule: RoutingRule
) -> Array:
    """The scores experts are chosen by: in training of logits with normal noise."""
    if keys_B is None or not r.router_noise:
        return scores
    noise = jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:], jnp.float32))(keys_B)
    return rule.scores(logits + r.router_noise * noise)


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

    def sums(mask_BMN):
        by_position_M = mask_BMN.sum(axis=(0, 2)).astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST  # of counts
        by_quarter_4 = jnp.matmul(quarter_4M, by_position_M, precision=exact)
        return mask_BMN.sum(axis=(0, 1)).astype(jnp.float32), by_quarter_4

    chosen_N, chosen_4 = sums(chosen_BMN)
    kept_N, kept_4 = sums(kept_BMN)
    untouched_BM = valid_BM & ~kept_BMN.any(axis=-1)
    return RoutingStats(
        balance=n * (share_BN * mean_share_BN).sum(),
        z=_z(logits, valid_BM).sum(),
        patches=valid_BM.sum().astype(jnp.float32),
        untouched=untouched_BM.sum().astype(jnp.float32),
        entropy=jax.lax.stop_gradient(entropy_BM.sum()),
        chosen_N=chosen_N,
        kept_N=kept_N,
        chosen_4=chosen_4,
        kept_4=kept_4,
    )
