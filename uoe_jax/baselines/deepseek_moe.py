"""DeepSeekMoE: many small experts, some of which every token goes through.

score='softmax' is DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066): the K best experts, weighed by their softmax
probabilities as they are. score='sigmoid' is DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): experts are chosen by
sigmoid(logit) + bias, and weighed by the sigmoids of the chosen ones rescaled to sum to `model.moe.scale`; the bias
(`model.moe.bias_rate`) balances the load without a loss. The balance loss is over the sigmoids rescaled to sum to 1, of every
row by itself; it counts the experts that were chosen, with the bias (in equation 18 those of the best sigmoids alone).
Tokens beyond an expert's capacity are dropped, which DeepSeek does not do: `uoe compare` gives N / K for capacity_factor, with
which nothing is. V3's limit to experts of a few groups, which bounds what its machines send each other, is left out.
"""

from __future__ import annotations

import jax
from flax import nnx

from uoe_jax.baselines.mixture import Mixture, rescaled
from uoe_jax.config.schema import ModelConfig
from uoe_jax.moe.routing import UNION, Rule


def rule_of(score: str, scale: float) -> Rule:
    """What logits mean under `model.moe.score`."""
    if score == "softmax":
        return UNION._replace(weigh=lambda r, logits, scores, chosen: scores)
    return UNION._replace(
        log_shares=lambda logits: jax.nn.log_softmax(jax.nn.log_sigmoid(logits)),
        scores=jax.nn.sigmoid,
        weigh=lambda r, logits, scores, chosen: rescaled(scores, chosen, scale),
    )


class DeepSeekMoE(Mixture):
    """model.mlp='deepseek_moe'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rule_of(c.moe.score, c.moe.scale), rngs=rngs)
