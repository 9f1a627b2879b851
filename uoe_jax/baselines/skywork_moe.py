"""Skywork-MoE (Wei et al. 2024, arXiv 2406.06563): normalised gating logits, and a balance weight that each layer finds.

A token's logits are shifted and scaled to mean 0 and standard deviation `model.moe.logit_scale` before the softmax, which
keeps the choice of experts from blurring. The K best probabilities are rescaled to sum to 1, as in Mixtral. After every
step a layer's balance weight moves towards `adaptive_rate` times the share of its choices that were dropped, or towards
`adaptive_most` where that is less (equation 9, `train.step.rebalance`). The balance loss is of every row by itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.mixture import Mixture, rescaled
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import weight
from uoe_jax.moe.routing import UNION


def normalised(logits: jax.Array, scale: float) -> jax.Array:
    """Logits [...,N] with mean 0 and standard deviation `scale` over the experts."""
    centred = logits - logits.mean(axis=-1, keepdims=True)
    # Not jnp.std, whose gradient is infinite where all logits are alike.
    return scale * centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-8)


class SkyworkMoE(Mixture):
    """model.mlp='skywork_moe'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        scale = c.moe.logit_scale
        rule = UNION._replace(
            log_shares=lambda logits: jax.nn.log_softmax(normalised(logits, scale)),
            scores=lambda logits: jax.nn.softmax(normalised(logits, scale)),
            weigh=lambda r, logits, scores, chosen: rescaled(scores, chosen),
        )
        super().__init__(c, rule, rngs=rngs)
        if c.moe.adaptive_rate:  # not trained: the train step moves it
            start = nnx.initializers.constant(c.moe.balance_weight)
            self.router.balance_weight = weight(rngs, (1,), (None,), start, exact=True)
