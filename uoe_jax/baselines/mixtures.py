"""The five mixtures of experts, chosen by `model.mlp`: a `UoME` with another `RoutingRule` each.

A mixture's experts are small MLPs of their own, never parts of one. Capacity and the balance loss
are of each row by itself, so that a row does not depend on the rest of the batch; the authors count
both over the batch.
"""

from typing import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.config.baselines import MoEConfig
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.mlp import MLP, mlp_options
from uoe_jax.layers.uome import UoME
from uoe_jax.layers.weights import weight
from uoe_jax.moe.routing import UNION, RoutingRule, rescaled

SOFTMAX = UNION._replace(weigh=lambda r, logits, scores, chosen: scores)
# Of router scores that each stand alone.
SIGMOID = UNION._replace(
    log_shares=lambda logits: jax.nn.log_softmax(jax.nn.log_sigmoid(logits)), scores=jax.nn.sigmoid
)


class Mixture(UoME):
    """N routed experts of width `d_expert`, and `n_shared` more as one MLP for every token."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        moe, width, options = c.moe, c.d_expert, mlp_options(c)
        routed, rule = (moe.n_experts * width, moe.routing(c.mlp)), RULES[c.mlp](moe)
        of_experts = dict(causal=c.causal, fan_in=width, rule=rule, rngs=rngs, **options)
        super().__init__(c.d_model, *routed, **of_experts)
        if moe.n_shared:
            whole = options | {"bias": False}
            self.shared = MLP(c.d_model, moe.n_shared * width, rngs=rngs, **whole)
        if moe.adaptive_rate:  # not trained: the train step moves it
            start = nnx.initializers.constant(moe.balance_weight)
            self.router.balance_weight = weight(rngs, (1,), (None,), start, exact=True)


def token_choice(moe: MoEConfig) -> RoutingRule:
    """Every token takes the top K experts, by position while slots last.

    K = 1 is the Switch Transformer (Fedus, Zoph, Shazeer 2021, arXiv 2101.03961), whose output is
    scaled by the softmax probability; K > 1 is GShard (Lepikhin et al. 2020, arXiv 2006.16668) and
    Mixtral (Jiang et al. 2024, arXiv 2401.04088), whose chosen probabilities are rescaled to sum
    to 1. GShard counts capacity in groups across the batch, first choices first; here it is counted
    in windows of a row, token by token, as a causal model must. GShard's balance loss counts first
    choices, here all K; it draws the second expert, here the second best.
    """
    if moe.k == 1:
        return SOFTMAX
    return UNION._replace(weigh=lambda r, logits, scores, chosen: rescaled(scores, chosen))


def expert_choice(moe: MoEConfig) -> RoutingRule:
    """Every expert takes its best tokens of a row; for encoders.

    Zhou et al. 2022, arXiv 2202.09368. A token may be taken by any number of experts, also by none;
    its output is their sum, weighed by the softmax probabilities. An expert takes
    ceil(capacity_factor·L·K/N) tokens, which depend on later ones.
    """
    return SOFTMAX._replace(
        choose=lambda ranked, valid, k: jnp.broadcast_to(valid[..., None], ranked.shape)
    )


def deepseek_moe(moe: MoEConfig) -> RoutingRule:
    """Many small experts, and shared ones for every token.

    score='softmax' is DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066): the top K experts, weighed
    by their softmax probabilities. score='sigmoid' is DeepSeek-V3 (arXiv 2412.19437, section
    2.1.2): experts are chosen by sigmoid(logit) + load-balancing bias (`model.moe.bias_rate`) and
    weighed by the chosen sigmoids rescaled to sum to `model.moe.scale`. The balance loss is over
    the sigmoids rescaled to sum to 1, and counts the choices made with the bias (equation 18:
    without it). Tokens beyond an expert's capacity are dropped, which DeepSeek does not do; with
    capacity_factor = N / K none is. V3's limit to a few groups of experts is left out.
    """
    if moe.score == "softmax":
        return SOFTMAX
    return SIGMOID._replace(
        weigh=lambda r, logits, scores, chosen: rescaled(scores, chosen, moe.scale)
    )


def xmoe(moe: MoEConfig) -> RoutingRule:
    """Small experts, of which a token takes as many as it needs.

    Yang et al. 2024, arXiv 2403.18926. A token takes its best experts until their softmax
    probabilities sum to `model.moe.threshold`, each weighed by its probability. K is how many are
    expected, for the capacity. An untrained router chooses nearly all, and slots go by position
    (the authors': first choices first); capacity_factor = N/K drops nothing. The balance loss
    counts all choices (the authors': first choices).
    """

    def choose(scores: Array, valid: Array, k: int) -> Array:
        scores = jax.lax.stop_gradient(scores)
        order = jnp.argsort(-scores, axis=-1, stable=True)  # the lower index wins a tie
        descending = jnp.take_along_axis(scores, order, axis=-1)
        wanted = jnp.cumsum(descending, axis=-1) - descending < moe.threshold
        rank = jnp.argsort(order, axis=-1)
        return jnp.take_along_axis(wanted, rank, axis=-1) & valid[..., None]

    return SOFTMAX._replace(choose=choose)


def skywork_moe(moe: MoEConfig) -> RoutingRule:
    """Normalised logits, and each layer adapts its balance weight.

    Wei et al. 2024, arXiv 2406.06563. A token's logits are normalised to mean 0 and standard
    deviation `model.moe.logit_scale` before the softmax, which keeps choices sharp. The top K
    probabilities are rescaled to sum to 1, as in Mixtral. After every step a layer's balance weight
    moves towards `adaptive_rate` times the share of its choices that were dropped, at most
    `adaptive_most` (equation 9, `train.step.rebalance`).
    """

    def normalised(logits: Array) -> Array:
        centred = logits - logits.mean(axis=-1, keepdims=True)
        # Not jnp.std, whose gradient is infinite where all logits are alike.
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        return moe.logit_scale * centred * jax.lax.rsqrt(variance + 1e-8)

    return UNION._replace(
        log_shares=lambda logits: jax.nn.log_softmax(normalised(logits)),
        scores=lambda logits: jax.nn.softmax(normalised(logits)),
        weigh=lambda r, logits, scores, chosen: rescaled(scores, chosen),
    )


_RULES = (token_choice, expert_choice, deepseek_moe, xmoe, skywork_moe)
RULES: dict[str, Callable[[MoEConfig], RoutingRule]] = {f.__name__: f for f in _RULES}
