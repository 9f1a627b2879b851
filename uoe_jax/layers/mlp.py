"""The dense MLP block: the one a UoME decomposes."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region
from uoe_jax.layers.common import GATED, Block, Outputs, Step, Tokens, activate, add_bias, linear
from uoe_jax.layers.weights import scaled_normal, weight, weight_if, zeros


def mlp_options(c: ModelConfig) -> dict[str, Any]:
    """Keyword arguments that all MLP blocks have in common."""
    return dict(activation=c.activation, bias=c.bias, dtype=c.dtype, out_scale=c.out_scale)


class MLP(Block):
    """y = act(x·W_up)·W_down; gated, y = (act(x·W_gate) * (x·W_up))·W_down."""

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
        d, f, gated, into = d_model, d_hidden, activation in GATED, ("embed", "hidden")
        self.w_up = weight(rngs, (d, f), into, scaled_normal(d))
        self.w_gate = weight_if(gated, rngs, (d, f), into, scaled_normal(d))
        self.w_down = weight(rngs, (f, d), ("hidden", "embed"), scaled_normal(f, out_scale))
        self.b_up = weight_if(bias, rngs, (f,), ("hidden",), zeros)
        self.b_gate = weight_if(bias and gated, rngs, (f,), ("hidden",), zeros)
        self.bias_out = weight_if(bias, rngs, (d,), (None,), zeros)

    def _forward(self, x_BLD: Array, tokens: Any = None, region: Region = WHOLE) -> Outputs:
        _, x_BLD = region.gather_inputs(x_BLD.astype(self.dtype))
        y_BLD = region.reduce_outputs(self.partial(x_BLD))
        return add_bias(y_BLD, region.weight_for_local_tokens(self.bias_out)), None, None

    def partial(self, x: Array) -> Array:
        """This shard's hidden units' part of the output for x [...,D], without the output bias."""
        up, gate = self._hidden(x, self.w_up, self.b_up), None
        if self.w_gate is not None:
            gate = self._hidden(x, self.w_gate, self.b_gate)
        return linear(activate(self.activation, up, gate), self.w_down[...].astype(self.dtype))

    def _hidden(self, x: Array, w: nnx.Param, b: nnx.Param | None) -> Array:
        return checkpoint_name(add_bias(linear(x, w[...].astype(self.dtype)), b), "hidden")

    def _start_cache(self, state: None, tokens: Tokens, context: int) -> tuple[()]:
        return ()

    def decode_step(self, x_BD: Array, cache: Any, t_B: Array, rotary: Any) -> Step:
        return self._forward(x_BD[:, None])[0][:, 0], cache
