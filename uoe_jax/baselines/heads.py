"""Attentions whose heads are routed: MoSA and MoH."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.baselines.mixtures import SIGMOID
from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import Region
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import valid_tokens
from uoe_jax.layers.router import router_logits
from uoe_jax.layers.smha import SMHA
from uoe_jax.layers.weights import scaled_normal, weight, weight_if
from uoe_jax.moe.routing import RoutingStats, choose_experts, rescaled, statistics

MOSA = SIGMOID._replace(weigh=lambda r, logits, scores, chosen: scores)


class MoSA(SMHA):
    """model.attention='mosa': mixture of sparse attention, every head takes its best tokens.

    Piękos, Csordás, Schmidhuber 2025, arXiv 2505.00315. A head takes the `capacity_factor`·L tokens
    with the highest sigmoid router scores, attends among them at their true positions, and scales
    its output by the scores: an SMHA of one head an expert. For encoders: the authors' language
    models mask by position among tokens chosen with knowledge of the future. They also add some
    dense heads, and rotate half of a head.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        routing = c.mosa.routing(c.n_heads)
        super().__init__(c.d_model, c.n_heads, routing, rule=MOSA, rngs=rngs, **options(c))


class MoH(Attention):
    """model.attention='moh': multi-head attention as a mixture of heads.

    Jin et al. 2024, arXiv 2410.11842. The first S heads take every token; of the others a token
    chooses K. Routed heads are weighed by K times their softmax scores rescaled over the chosen,
    shared heads by S times a softmax among themselves, and both kinds by twice a softmax between
    the two kinds, as in the authors' code. The balance loss is of each row by itself. All heads are
    computed for all tokens, as there; only `costs.memory.idle_parameters` knows of idle heads.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c.d_model, c.n_heads, rngs=rngs, **options(c))
        d, s = c.d_model, c.moh.n_shared
        self.n_shared, self.k = s, c.moh.k
        axes, init = ("embed", None), scaled_normal(d, 0.3)
        self.w_routed = weight(rngs, (d, c.n_heads - s), axes, init, exact=True)
        self.w_shared = weight_if(s > 1, rngs, (d, s), axes, init, exact=True)
        self.w_kinds = weight_if(s, rngs, (d, 2), axes, init, exact=True)

    def _weighed(
        self, o: Array, x_BLD: Array, segments_BL: Array | None, region: Region
    ) -> tuple[Array, RoutingStats]:
        x, valid_BL = x_BLD.astype(jnp.float32), valid_tokens(segments_BL, x_BLD)
        logits = router_logits(x, self.w_routed)
        scores = jax.nn.softmax(logits)
        chosen = choose_experts(scores, jnp.ones(scores.shape[:2], bool), self.k)
        weights_BLH = rescaled(scores, chosen, self.k)
        if self.w_kinds is not None:
            kinds = 2 * jax.nn.softmax(router_logits(x, self.w_kinds))
            shared = kinds[..., :1]
            if self.w_shared is not None:
                shared *= self.n_shared * jax.nn.softmax(router_logits(x, self.w_shared))
            weights_BLH = jnp.concatenate([shared, kinds[..., 1:] * weights_BLH], axis=-1)
        h, weights_BLH = o.shape[2], region.as_varying(weights_BLH)
        own_BLh = jax.lax.dynamic_slice_in_dim(weights_BLH, h * region.shard_index, h, axis=2)
        chosen = chosen & valid_BL[..., None]
        return o * own_BLh[..., None].astype(o.dtype), statistics(logits, chosen, chosen, valid_BL)
