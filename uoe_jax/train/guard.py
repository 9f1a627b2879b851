"""Bad steps: found inside the compiled step, so that all processes agree, and skipped.

A step is bad where its loss or gradient norm is not finite, or (guard.spike_sigmas) far above what they were lately. It then
changes nothing but the counters here: parameters, optimizer, balancing biases and running moments stay as they were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uoe_jax.config.schema import GuardConfig

WINDOW = 128  # good steps that the running moments stand for, and that must have been seen before a step can be a spike


class Guard(NamedTuple):
    """What is remembered of the steps before; checkpointed with the parameters.

    Attributes:
      skipped: bad steps of the whole run, but for those a rollback took back, int32.
      in_a_row: those since the last good one, int32.
      seen: good steps, int32.
      mean, variance: running ones of (loss, gradient norm) over good steps, float32 [2].
      offset: batches left out by going back; step s takes batch s + offset, int32.
      rollbacks: times the run went back, int32.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    seen: jax.Array
    mean: jax.Array
    variance: jax.Array
    offset: jax.Array
    rollbacks: jax.Array


def fresh() -> Guard:
    """The guard of a run that begins."""
    zero, moments = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.float32)
    return Guard(zero, zero, zero, moments, moments, zero, zero)


def judge(
    c: GuardConfig, guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Guard]:
    """(whether a step with this loss and gradient norm is bad, the guard after it); all are global values."""
    found = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    bad = ~jnp.isfinite(found).all()
    if c.spike_sigmas:
        bad |= (guard.seen >= WINDOW) & (
            found > guard.mean + c.spike_sigmas * jnp.sqrt(guard.variance)
        ).any()
    # A plain mean at first, then an exponential one. A value that is not finite must not come near it, even times 0.
    weight = 1 / jnp.minimum(guard.seen + 1, WINDOW).astype(jnp.float32)
    away = jnp.where(
        bad, 0, jnp.minimum(found, 1e18) - guard.mean
    )  # its square must be finite, too
    moved = guard._replace(
        in_a_row=jnp.zeros_like(guard.in_a_row),
        seen=guard.seen + 1,
        mean=guard.mean + weight * away,
        variance=(1 - weight) * (guard.variance + weight * away**2),
    )
    counted = guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return bad, select_state(bad, moved, counted)


def select_state(bad: jax.Array, new: Any, old: Any) -> Any:
    """`new`, or `old` where the step is bad."""
    return jax.tree.map(lambda n, o: jnp.where(bad, o, n), new, old)
