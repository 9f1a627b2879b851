"""The dense MLP block: the one a UoME decomposes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.layers.common import GATED, Tokens, activate, along_last, scaled_normal, weight, zeros


class MLP(nnx.Module):
    """y = act(x·W_up [, x·W_gate])·W_down, with biases where asked; letters in `layers.common`."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        activation: str = "gelu",
        bias: bool = False,
        dtype: Any = jnp.float32,
        out_scale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation, self.dtype = activation, dtype
        d, f = d_model, d_hidden
        self.w_up = weight(rngs, (d, f), ("embed", "hidden"), scaled_normal(d))
        self.w_gate = weight(rngs, (d, f), ("embed", "hidden"), scaled_normal(d)) if activation in GATED else None
        self.w_down = weight(rngs, (f, d), ("hidden", "embed"), scaled_normal(f, out_scale))
        self.b_up = weight(rngs, (f,), ("hidden",), zeros) if bias else None
        self.b_gate = weight(rngs, (f,), ("hidden",), zeros) if bias and self.w_gate is not None else None
        self.bias_out = weight(rngs, (d,), ("embed",), zeros) if bias else None

    def __call__(self, x_BLD: jax.Array, tokens: Tokens | None = None) -> tuple[jax.Array, None]:
        """Every token by itself; returns (y_BLD, None: nothing is routed)."""
        x = x_BLD.astype(self.dtype)
        up = checkpoint_name(self._linear(x, self.w_up, self.b_up), "hidden")
        gate = None if self.w_gate is None else checkpoint_name(self._linear(x, self.w_gate, self.b_gate), "hidden")
        return self._linear(activate(self.activation, up, gate), self.w_down, self.bias_out), None

    def _linear(self, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        y = x @ kernel[...].astype(self.dtype)
        return y if bias is None else y + along_last(bias[...].astype(self.dtype), y)

    def prefill(self, x_BLD: jax.Array, tokens: Tokens, context: int) -> tuple[jax.Array, tuple]:
        """The whole prompt; a dense MLP needs no cache."""
        return self(x_BLD)[0], ()

    def step(self, x_BD: jax.Array, cache: tuple, t_B: jax.Array, rotary: Any) -> tuple[jax.Array, tuple]:
        """One token of each sequence."""
        return self(x_BD[:, None])[0][:, 0], cache
