"""Bad steps: found inside the compiled step, so that all processes agree, and skipped.

A step is bad if its loss or gradient norm is not finite, or (guard.spike_sigmas) far above the
recent ones. It then changes only the counters here: parameters, optimizer state, load-balancing
biases and running moments stay.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from uoe_jax.config.schema import GuardConfig

WINDOW = 128  # good steps in the running moments; after as many, a step can be a spike


class Guard(NamedTuple):
    """What is known of the steps before; checkpointed with the parameters. Counts are int32."""

    skipped: Array  # bad steps of the whole run, without those that a rollback took back
    in_a_row: Array  # bad steps since the last good one
    seen: Array  # good steps
    mean: Array  # running mean of (loss, gradient norm) over good steps, float32 [2]
    variance: Array  # and their variance
    offset: Array  # batches skipped by rollbacks; step s takes batch s + offset
    rollbacks: Array


def fresh() -> Guard:
    """The guard of a new run."""
    zero, moments = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.float32)
    return Guard(zero, zero, zero, moments, moments, zero, zero)


def judge(c: GuardConfig, guard: Guard, loss: Array, grad_norm: Array) -> tuple[Array, Guard]:
    """(Whether a step with these global values is bad, the guard after it)."""
    found = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    bad = ~jnp.isfinite(found).all()
    if c.spike_sigmas:
        bound = guard.mean + c.spike_sigmas * jnp.sqrt(guard.variance)
        bad |= (guard.seen >= WINDOW) & (found > bound).any()
    # A plain mean at first, then an exponential one. The square of `delta` must be finite, as even
    # 0 times an infinity would spoil the moments.
    weight = 1 / jnp.minimum(guard.seen + 1, WINDOW).astype(jnp.float32)
    delta = jnp.where(bad, 0, jnp.minimum(found, 1e18) - guard.mean)
    mean = guard.mean + weight * delta
    variance = (1 - weight) * (guard.variance + weight * delta**2)
    none = jnp.zeros_like(guard.in_a_row)
    good = guard._replace(in_a_row=none, seen=guard.seen + 1, mean=mean, variance=variance)
    skipped = guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return bad, optax.tree_utils.tree_where(bad, skipped, good)
