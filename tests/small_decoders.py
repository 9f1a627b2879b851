"""A small decoder with random weights: the full pass, the prefill and the step, jitted."""

from __future__ import annotations

import functools

import jax
import numpy as np
import reference
from flax import nnx

from uoe_jax.config import ModelConfig
from uoe_jax.models.decoder import Transformer

D, F, H, N, V, CONTEXT = 16, 32, 4, 4, 11, 48


def build(config: ModelConfig, scale: float = 0.3):
    """(full pass, prefill, step), jitted, of a model whose weights are all random."""
    graphdef, state = reference.build(lambda: Transformer(config, rngs=nnx.Rngs(0)), scale=scale)

    def jitted(method, **kwargs):
        return functools.partial(
            jax.jit(lambda state, *args: method(nnx.merge(graphdef, state), *args, **kwargs)), state
        )

    return (
        jitted(Transformer.__call__),
        jitted(Transformer.prefill, context=config.context_length),
        jitted(Transformer.decode_step),
    )


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape, np.int32)
