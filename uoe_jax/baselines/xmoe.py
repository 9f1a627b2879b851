"""XMoE (Yang et al. 2024, arXiv 2403.18926): small experts, of which a token takes as many as it needs.

A token takes its best experts until their softmax probabilities sum to `model.moe.threshold`, each weighed by its
probability. The capacity is that of K experts a token: K says how many are expected. A router that knows nothing yet chooses
nearly all, and slots are filled in the order of the tokens, as causal models must (the authors fill them first choices first):
capacity_factor = N/K drops nothing. The balance loss counts all choices of a row (the authors': first choices of the batch).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.mixture import Mixture
from uoe_jax.config.schema import ModelConfig
from uoe_jax.moe.routing import UNION


def until(scores: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
    """bool [...,N]: the best experts of each valid token until their scores sum to the threshold; lower index first in a tie.

    An expert is chosen where the better ones alone do not reach the threshold.
    """
    ordered = jnp.argsort(-jax.lax.stop_gradient(scores), axis=-1, stable=True)
    keep_by_score = jnp.take_along_axis(jax.lax.stop_gradient(scores), ordered, axis=-1)
    wanted = jnp.cumsum(keep_by_score, axis=-1) - keep_by_score < threshold
    rank = jnp.argsort(ordered, axis=-1)
    return jnp.take_along_axis(wanted, rank, axis=-1) & valid[..., None]


class XMoE(Mixture):
    """model.mlp='xmoe'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        rule = UNION._replace(
            choose=lambda scores, valid, k: until(scores, valid, c.moe.threshold),
            weigh=lambda r, logits, scores, chosen: scores,
        )
        super().__init__(c, rule, rngs=rngs)
