"""UoME: a union of MLP experts. The dense MLP cut in N equal partitions of its hidden width, each working on its slots."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.routing import RoutingConfig
from uoe_jax.layers.common import (
    GATED,
    Tokens,
    activate,
    add_bias,
    scaled_normal,
    valid_tokens,
    weight,
    zeros,
)
from uoe_jax.layers.router import RouterCache
from uoe_jax.layers.union import Slots, Union, per_expert
from uoe_jax.moe.routing import UNION, Rule


class UoME(Union):
    """Union-of-MLP-Experts.

    Args:
      d_model, d_hidden: D and F of the whole MLP; every expert has f = F/N hidden columns and rows.
      routing: N, K, capacity, patch size, gate.
      activation: gelu, gelu_tanh, relu, swiglu or geglu. bias: hidden biases per expert, one output bias for the union.
      causal: admit only what cannot see the future. dtype: of the computation; weights are float32.
      fan_in: of the output projection's initialisation; 0: the whole F. rule: what the router's logits mean.

    Raises:
      ValueError: N does not divide F; K above N; causal with a unit or priority that sees the future. ConfigError: a value of
        `routing` that its declaration does not allow.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        routing: RoutingConfig,
        *,
        activation: str = "gelu",
        bias: bool = False,
        causal: bool = False,
        dtype: Any = jnp.float32,
        out_scale: float = 1.0,
        fan_in: int = 0,
        rule: Rule = UNION,
        rngs: nnx.Rngs,
    ) -> None:
        d, n = d_model, routing.n_experts
        f, rest = divmod(d_hidden, n)
        if rest:
            raise ValueError(f"d_hidden={d_hidden} cannot be cut in n_experts={n} equal partitions")
        super().__init__(d, routing, causal=causal, dtype=dtype, rule=rule, rngs=rngs)
        self.activation = activation
        into, out = ("expert", "embed", None), ("expert", None, "embed")
        self.w_up = weight(rngs, (n, d, f), into, scaled_normal(d))
        self.w_gate = (
            weight(rngs, (n, d, f), into, scaled_normal(d)) if activation in GATED else None
        )
        self.w_down = weight(rngs, (n, f, d), out, scaled_normal(fan_in or d_hidden, out_scale))
        self.b_up = weight(rngs, (n, f), ("expert", None), zeros) if bias else None
        self.b_gate = (
            weight(rngs, (n, f), ("expert", None), zeros)
            if bias and self.w_gate is not None
            else None
        )
        self.bias_out = weight(rngs, (d,), (None,), zeros) if bias else None

    def _enter(self, x_NBSD: jax.Array) -> tuple[jax.Array, ...]:
        into = ((self.w_up, self.b_up), (self.w_gate, self.b_gate))
        return tuple(
            self._into(x_NBSD, kernel, bias) for kernel, bias in into if kernel is not None
        )

    def _experts(self, entered: tuple[jax.Array, ...], slots: Slots) -> tuple[jax.Array, tuple]:
        return self._leave(entered, slots.weight_NBS), ()

    def _leave(self, entered: tuple[jax.Array, ...], weight_NBS: jax.Array) -> jax.Array:
        up, gate = (*(checkpoint_name(a, "hidden") for a in entered), None)[:2]
        # The combine weight goes on the hidden values: the same sum, and no need to keep the outputs for its gradient.
        hidden_NBSf = activate(self.activation, up, gate) * weight_NBS[..., None].astype(self.dtype)
        return per_expert(hidden_NBSf, self.w_down[...].astype(self.dtype))

    def _into(self, x_NBSD: jax.Array, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        y_NBSf = per_expert(x_NBSD, kernel[...].astype(self.dtype))
        return add_bias(y_NBSf, None if bias is None else bias[...][:, None, None])

    def prefill(
        self, x_BLD: jax.Array, tokens: Tokens, context: int
    ) -> tuple[jax.Array, RouterCache]:
        """The whole prompt, and the cache for the tokens after it."""
        y_BLD, _, selection, _ = self._forward(x_BLD, tokens)
        return y_BLD, self.router.start_cache(
            selection, valid_tokens(tokens.segments_BL, x_BLD).sum(axis=1)
        )

    def decode_step(
        self, x_BD: jax.Array, cache: RouterCache, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, RouterCache]:
        """Token `t_B` of each sequence."""
        x_BD = x_BD.astype(self.dtype)
        cache = self.router.decode_step(x_BD, cache, t_B)
        y_NB1D = self._leave(self._enter(x_BD[None, :, None]), cache.weight_BN.T[..., None])
        return self._union(y_NB1D, x_BD), cache
