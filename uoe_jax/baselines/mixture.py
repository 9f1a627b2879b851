"""What the mixtures of experts share: experts of a width of their own, each an MLP, beside shared ones for every token.

They are routed, dispatched and combined as unions of experts are, over the mesh axis `expert`: a mixture is a union whose
parts were never one MLP, with another rule to choose them and to weigh them. Capacity counts inside a row, never across
the batch, so that a sequence does not depend on its batch mates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.mlp import MLP
from uoe_jax.layers.uome import UoME
from uoe_jax.moe.routing import Rule


class Mixture(UoME):
    """N routed experts of hidden width `d_expert`, and `n_shared` of them together as one MLP for every token.

    With biases, hidden units of the routed experts have theirs, and the block one output bias.
    """

    def __init__(self, c: ModelConfig, rule: Rule, *, rngs: nnx.Rngs) -> None:
        moe, width = c.moe, c.d_expert
        super().__init__(
            c.d_model, moe.n_experts * width, moe.routing(c.mlp), activation=c.activation, bias=c.bias, causal=c.causal,
            dtype=c.dtype, out_scale=c.out_scale, fan_in=width, rule=rule, rngs=rngs,
        )  # fmt: skip
        hidden = moe.n_shared * width
        self.shared = (
            MLP(
                c.d_model,
                hidden,
                activation=c.activation,
                dtype=c.dtype,
                out_scale=c.out_scale,
                rngs=rngs,
            )
            if moe.n_shared
            else None
        )

    def _shared_experts(self, x: jax.Array) -> jax.Array | None:
        return None if self.shared is None else self.shared.partial(x)


def rescaled(scores: jax.Array, chosen: jax.Array, total: float = 1.0) -> jax.Array:
    """The scores [...,N] of the chosen experts, rescaled to sum to `total`."""
    kept = jnp.where(chosen, scores, 0)
    return total * kept / jnp.maximum(kept.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
