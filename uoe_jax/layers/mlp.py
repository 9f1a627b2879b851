"""The dense MLP block: the one a UoME decomposes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.distributed.manual import WHOLE, Region, run
from uoe_jax.layers.common import (
    GATED,
    Tokens,
    activate,
    add_bias,
    linear,
    scaled_normal,
    weight,
    zeros,
)


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
        self.w_gate = (
            weight(rngs, (d, f), ("embed", "hidden"), scaled_normal(d))
            if activation in GATED
            else None
        )
        self.w_down = weight(rngs, (f, d), ("hidden", "embed"), scaled_normal(f, out_scale))
        self.b_up = weight(rngs, (f,), ("hidden",), zeros) if bias else None
        self.b_gate = (
            weight(rngs, (f,), ("hidden",), zeros) if bias and self.w_gate is not None else None
        )
        self.bias_out = weight(rngs, (d,), (None,), zeros) if bias else None

    def __call__(self, x_BLD: jax.Array, tokens: Tokens | None = None) -> tuple[jax.Array, None]:
        """Every token by itself; returns (y_BLD, None: nothing is routed). On a mesh, hidden units lie on `expert`."""
        graphdef, weights = nnx.split(self)

        def share(
            weights: nnx.State, x_BLD: jax.Array, _: None, region: Region
        ) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, weights)._forward(x_BLD, region), None

        return run(share, weights, x_BLD, dtype=self.dtype)

    def _forward(self, x_BLD: jax.Array, region: Region = WHOLE) -> jax.Array:
        y = region.reduce_outputs(self.partial(region.gather_inputs(x_BLD.astype(self.dtype))[1]))
        return add_bias(y, region.weight_for_local_tokens(self.bias_out))

    def partial(self, x: jax.Array) -> jax.Array:
        """What the hidden units held here give for tokens [...,D], without the output bias."""
        up = checkpoint_name(self._linear(x, self.w_up, self.b_up), "hidden")
        gate = (
            None
            if self.w_gate is None
            else checkpoint_name(self._linear(x, self.w_gate, self.b_gate), "hidden")
        )
        return self._linear(activate(self.activation, up, gate), self.w_down, None)

    def _linear(self, x: jax.Array, kernel: nnx.Param, bias: nnx.Param | None) -> jax.Array:
        return add_bias(linear(x, kernel[...].astype(self.dtype)), bias)

    def prefill(self, x_BLD: jax.Array, tokens: Tokens, context: int) -> tuple[jax.Array, tuple]:
        """The whole prompt; a dense MLP needs no cache."""
        return self._forward(x_BLD), ()

    def decode_step(
        self, x_BD: jax.Array, cache: tuple, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, tuple]:
        """One token of each sequence."""
        return self._forward(x_BD[:, None])[:, 0], cache
