"""MoH (Jin et al. 2024, arXiv 2410.11842): multi-head attention as a mixture of heads.

The first S heads are every token's; of the others a token chooses K. A head's output is weighed: routed heads by K times
their softmax scores rescaled over the chosen, shared heads by S times a softmax among themselves, and both kinds by twice a
softmax between the two kinds, as the authors' code does; the balance loss is of every row by itself. All heads are computed for
all tokens, as there: a token's idle heads are left out of the active parameters (`memory.active_parameters`), and nowhere else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.baselines.mixture import rescaled
from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import Region
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import scaled_normal, valid_tokens, weight
from uoe_jax.moe.routing import RoutingStats, choose_experts, statistics


class MoH(Attention):
    """model.attention='moh'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c.d_model, c.n_heads, n_kv_heads=c.kv_heads, rngs=rngs, **options(c))
        self.n_shared, self.k = c.moh.n_shared, c.moh.k

        def kernel(n: int) -> nnx.Param:
            return weight(
                rngs, (c.d_model, n), ("embed", None), scaled_normal(c.d_model, 0.3), exact=True
            )

        self.w_routed = kernel(c.n_heads - self.n_shared)
        self.w_shared = kernel(self.n_shared) if self.n_shared > 1 else None
        self.w_kinds = kernel(2) if self.n_shared else None

    def weights(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(weight of every head float32 [B,L,H], logits of the routed ones and whether a token chose them [B,L,H−S])."""
        x = x_BLD.astype(jnp.float32)
        logits = _scores(x, self.w_routed)
        scores = jax.nn.softmax(logits)
        chosen = choose_experts(scores, jnp.ones(scores.shape[:2], bool), self.k)
        routed = rescaled(scores, chosen, self.k)
        if self.w_kinds is None:
            return routed, logits, chosen
        among = (
            1.0
            if self.w_shared is None
            else self.n_shared * jax.nn.softmax(_scores(x, self.w_shared))
        )
        kinds = 2 * jax.nn.softmax(_scores(x, self.w_kinds))
        return (
            jnp.concatenate([kinds[..., :1] * among, kinds[..., 1:] * routed], axis=-1),
            logits,
            chosen,
        )

    def _weighed(
        self, o: jax.Array, x_BLD: jax.Array, segments_BL: jax.Array | None, region: Region
    ) -> tuple[jax.Array, RoutingStats]:
        weights_BLH, logits, chosen = self.weights(x_BLD)
        h = o.shape[2]
        own_BLh = jax.lax.dynamic_slice_in_dim(
            region.as_varying(weights_BLH), h * region.shard_index, h, axis=2
        )
        valid_BL = valid_tokens(segments_BL, x_BLD)
        chosen = chosen & valid_BL[..., None]
        return o * own_BLh[..., None].astype(o.dtype), statistics(logits, chosen, chosen, valid_BL)


def _scores(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    return jnp.matmul(x, kernel[...], precision=jax.lax.Precision.HIGHEST)
