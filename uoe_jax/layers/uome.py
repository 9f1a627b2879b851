"""UoME, a union of MLP experts: a dense MLP cut in N equal parts of its hidden width."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.routing import RoutingConfig
from uoe_jax.layers.common import GATED, Step, Tokens, activate, add_bias
from uoe_jax.layers.router import RouterCache
from uoe_jax.layers.union import Slots, Union, per_expert, per_row
from uoe_jax.layers.weights import scaled_normal, weight, weight_if, zeros
from uoe_jax.moe.routing import UNION, RoutingRule


class UoME(Union):
    """Union-of-MLP-Experts; raises ValueError if N does not divide F, else as `Union`."""

    def __init__(
        self,
        d_model: int,
        d_hidden: int,  # F of the whole MLP; an expert has F/N hidden units
        routing: RoutingConfig,
        *,
        activation: str = "gelu",
        bias: bool = False,  # hidden biases per expert, and one output bias
        causal: bool = False,
        dtype: Any = jnp.float32,  # of the computation; weights are float32
        out_scale: float = 1.0,  # w_down starts with standard deviation out_scale / sqrt(fan_in)
        fan_in: int = 0,  # 0: F
        rule: RoutingRule = UNION,
        rngs: nnx.Rngs,
    ) -> None:
        d, n, gated = d_model, routing.n_experts, activation in GATED
        f, rest = divmod(d_hidden, n)
        if rest:
            raise ValueError(f"d_hidden={d_hidden} cannot be cut in n_experts={n} equal partitions")
        super().__init__(d, routing, causal, dtype, rule, rngs)
        self.activation = activation
        into, out = ("expert", "embed", None), ("expert", None, "embed")
        down = scaled_normal(fan_in or d_hidden, out_scale)
        self.w_up = weight(rngs, (n, d, f), into, scaled_normal(d))
        self.w_gate = weight_if(gated, rngs, (n, d, f), into, scaled_normal(d))
        self.w_down = weight(rngs, (n, f, d), out, down)
        self.b_up = weight_if(bias, rngs, (n, f), ("expert", None), zeros)
        self.b_gate = weight_if(bias and gated, rngs, (n, f), ("expert", None), zeros)
        self.bias_out = weight_if(bias, rngs, (d,), (None,), zeros)

    def _project(self, x_NRSD: Array) -> tuple[Array, ...]:
        pairs = (self.w_up, self.b_up), (self.w_gate, self.b_gate)
        return tuple(
            add_bias(per_expert(x_NRSD, w[...].astype(self.dtype)), per_row(b))
            for w, b in pairs
            if w is not None
        )

    def _experts(self, projected: tuple[Array, ...], slots: Slots) -> tuple[Array, None]:
        return self._out(projected, slots.weight_NRS), None

    def _out(self, projected: tuple[Array, ...], weight_NRS: Array) -> Array:
        up, gate = (*(checkpoint_name(a, "hidden") for a in projected), None)[:2]
        # Weights go on the hidden values: the same sum, and no outputs kept for the gradient.
        hidden_NRSf = activate(self.activation, up, gate) * weight_NRS[..., None].astype(self.dtype)
        return per_expert(hidden_NRSf, self.w_down[...].astype(self.dtype))

    def _start_cache(self, state: Any, tokens: Tokens, context: int) -> RouterCache:
        return self.router.start_cache(state[0], tokens)

    def decode_step(self, x_BD: Array, cache: RouterCache, t_B: Array, rotary: Any) -> Step:
        x_BD = x_BD.astype(self.dtype)
        cache = self.router.decode_step(x_BD, cache, t_B)
        y_NB1D = self._out(self._project(x_BD[None, :, None]), cache.weight_BN.T[..., None])
        return self._sum_experts(y_NB1D, x_BD), cache
