"""Token choice: every token takes the K experts its router scores best, first come, first served.

K = 1 is the Switch Transformer (Fedus, Zoph, Shazeer 2021, arXiv 2101.03961), whose output is scaled by the softmax
probability; K > 1 is GShard (Lepikhin et al. 2020, arXiv 2006.16668) and Mixtral (Jiang et al. 2024, arXiv 2401.04088),
whose chosen probabilities are rescaled to sum to 1. GShard's capacity counts in groups across the batch and takes first choices
before second ones, here in windows of a row, token by token (a causal model cannot know later first choices); its balance loss
counts first choices, here all K; and it draws the second expert, which here is the second best. Balance losses are of every
row by itself, as no row depends on the others here; the authors' are of the batch.
"""

from __future__ import annotations

import jax
from flax import nnx

from uoe_jax.baselines.mixture import Mixture, rescaled
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.config.schema import ModelConfig
from uoe_jax.moe.routing import UNION


def _weigh(r: RoutingConfig, logits: jax.Array, scores: jax.Array, chosen: jax.Array) -> jax.Array:
    return scores if r.k == 1 else rescaled(scores, chosen)


class TokenChoice(Mixture):
    """model.mlp='token_choice'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, UNION._replace(weigh=_weigh), rngs=rngs)
