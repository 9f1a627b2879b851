"""Expert choice (Zhou et al. 2022, arXiv 2202.09368): every expert takes the tokens of a row that score it best.

A token may be taken by any number of experts, also by none; its output is the sum over those that took it, weighed by
their softmax probabilities. An expert takes ceil(capacity_factor·L·K/N) tokens. Whether a token is among the best depends
on the tokens after it, so this is for encoders.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.mixture import Mixture
from uoe_jax.config.schema import ModelConfig
from uoe_jax.moe.routing import UNION


class ExpertChoice(Mixture):
    """model.mlp='expert_choice'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        rule = UNION._replace(
            choose=lambda ranked, valid, k: jnp.broadcast_to(valid[..., None], ranked.shape),
            weigh=lambda r, logits, scores, chosen: scores,
        )
        super().__init__(c, rule, rngs=rngs)
