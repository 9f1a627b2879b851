"""How a weight is declared: shape, logical axes and initialiser in one place."""

from typing import Any, Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array

Initializer = Callable[[Array, tuple[int, ...], Any], Array]
zeros, ones = nnx.initializers.zeros, nnx.initializers.ones


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    exact: bool = False,
    trained: bool = True,
) -> nnx.Param:
    """Declares a float32 weight: shape, logical axes (its sharding follows), initialiser.

    exact: used in float32 whatever the compute dtype. trained: False for projections that stay as
    drawn; stop their gradient where they are used. Weight decay applies to matrices only.
    """
    assert len(shape) == len(axes), (shape, axes)
    # Scales and biases of several experts or heads are no matrices.
    decay = trained and init not in (zeros, ones) and len(shape) > 1
    value = init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes, decay=decay, exact=exact)


def weight_if(present: Any, *args: Any, **kwargs: Any) -> nnx.Param | None:
    """`weight(*args, **kwargs)` if it is present, else None."""
    return weight(*args, **kwargs) if present else None


def scaled_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in)."""
    return nnx.initializers.normal(scale / fan_in**0.5)
