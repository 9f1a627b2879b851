"""Moves patches to slots and back: `gather_slots` and `combine_slots`, each the transpose of the other.

Backends: `inverse` only gathers, forward and backward, through the inverse slot map of the `Selection`: no atomics,
deterministic, accumulation in float32. `scatter` lets autodiff turn the gather into a scatter-add and back.
A row of F values is one patch (F = P·D).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from uoe_jax.routing import Selection


def backend_for(name: str, dtype: jnp.dtype) -> str:
    """Resolves `auto`: scatter-add was measured faster only for 16-bit values on CPU, where gathers convert one by one."""
    if name != "auto":
        return name
    return "scatter" if jax.default_backend() == "cpu" and jnp.dtype(dtype).itemsize == 2 else "inverse"


def gather_slots(x_BMF: jax.Array, selection: Selection, backend: str = "auto") -> jax.Array:
    """The patches each expert selected, [N,B,C,F]. What an empty slot holds is unspecified."""
    if backend_for(backend, x_BMF.dtype) == "inverse":
        return _gather(x_BMF, selection.slots_NBC, selection.slot_of_BMN)
    b, m, f = x_BMF.shape
    return x_BMF.reshape(b * m, f).at[_rows_or_none(selection, b, m)].get(mode="fill", fill_value=0)


def gather_own(f_NBMF: jax.Array, selection: Selection, backend: str = "auto") -> jax.Array:
    """Every expert's own values of its patches at its slots, [N,B,M,F] to [N,B,C,F]; empty slots are unspecified."""
    if backend_for(backend, f_NBMF.dtype) == "inverse":
        return _gather_own(f_NBMF, selection.slots_NBC, selection.slot_of_BMN)
    return jnp.where(selection.valid_NBC[..., None], jnp.take_along_axis(f_NBMF, selection.slots_NBC[..., None], axis=2), 0)


def combine_slots(y_NBCF: jax.Array, selection: Selection, backend: str = "auto") -> jax.Array:
    """Sums the experts' results at their patches, [B,M,F]; empty slots and patches nobody took add nothing."""
    if backend_for(backend, y_NBCF.dtype) == "inverse":
        return _combine(y_NBCF, selection.slots_NBC, selection.slot_of_BMN)
    f = y_NBCF.shape[-1]
    b, m, _ = selection.slot_of_BMN.shape
    out = jnp.zeros((b * m, f), y_NBCF.dtype).at[_rows_or_none(selection, b, m)].add(y_NBCF, mode="drop")
    return out.reshape(b, m, f)


def _rows_or_none(selection: Selection, b: int, m: int) -> jax.Array:
    """[N,B,C] row of each slot in [B·M] rows; past the end for empty slots, so that they are dropped."""
    return jnp.where(selection.valid_NBC, selection.slots_NBC + m * jnp.arange(b, dtype=jnp.int32)[None, :, None], b * m)


def gather_rows(x_BMF: jax.Array, slots_NBC: jax.Array) -> jax.Array:
    """Rows of patches at slots, [N,B,C,F]; for values that are not differentiated (masks, positions)."""
    b, m, f = x_BMF.shape
    rows_NBC = slots_NBC + m * jnp.arange(b, dtype=jnp.int32)[None, :, None]
    return jnp.asarray(x_BMF).reshape(b * m, f).at[rows_NBC].get(mode="promise_in_bounds")


def _sum_slots(y_NBCF, slot_of_BMN):
    n, b, c, f = y_NBCF.shape
    m = slot_of_BMN.shape[1]
    y = y_NBCF.reshape(n * b * c, f)
    total = jnp.zeros((b, m, f), jnp.float32 if y.dtype.itemsize < 4 else y.dtype)
    # Unrolled over experts: one fused loop of gathers. A single gather would materialise [N,B,M,F].
    for i in range(n):
        slot_BM = slot_of_BMN[..., i]
        rows_BM = jnp.minimum(slot_BM, c - 1) + c * (i * b + jnp.arange(b, dtype=jnp.int32)[:, None])
        row_BMF = y.at[rows_BM].get(mode="promise_in_bounds")
        total = total + jnp.where((slot_BM < c)[..., None], row_BMF, 0).astype(total.dtype)
    return total.astype(y_NBCF.dtype)


@jax.custom_vjp
def _gather(x_BMF, slots_NBC, slot_of_BMN):
    return gather_rows(x_BMF, slots_NBC)


def _own_rows(f_NBXF: jax.Array, place_NBY: jax.Array) -> jax.Array:
    n, b, x, f = f_NBXF.shape
    rows_NBY = place_NBY + x * jnp.arange(n * b, dtype=jnp.int32).reshape(n, b, 1)
    return f_NBXF.reshape(n * b * x, f).at[rows_NBY].get(mode="promise_in_bounds")


@jax.custom_vjp
def _gather_own(f_NBMF, slots_NBC, slot_of_BMN):
    return _own_rows(f_NBMF, slots_NBC)


def _gather_own_bwd(slot_of_BMN, d_NBCF):
    """No sum over experts: each patch takes the gradient of its own slot in each expert, or none."""
    c = d_NBCF.shape[2]
    slot_NBM = jnp.transpose(slot_of_BMN, (2, 0, 1))
    d_NBMF = jnp.where((slot_NBM < c)[..., None], _own_rows(d_NBCF, jnp.minimum(slot_NBM, c - 1)), 0)
    return d_NBMF.astype(d_NBCF.dtype), None, None


_gather_own.defvjp(lambda f, slots, slot_of: (_own_rows(f, slots), slot_of), _gather_own_bwd)


@jax.custom_vjp
def _combine(y_NBCF, slots_NBC, slot_of_BMN):
    return _sum_slots(y_NBCF, slot_of_BMN)


# Only the integer maps are saved. The gradient of an empty slot is a copy of some patch's: harmless, because its
# combine weight is 0, and cheaper than a mask.
_gather.defvjp(
    lambda x, slots, slot_of: (gather_rows(x, slots), slot_of),
    lambda slot_of, d_NBCF: (_sum_slots(d_NBCF, slot_of), None, None),
)
_combine.defvjp(
    lambda y, slots, slot_of: (_sum_slots(y, slot_of), slots),
    lambda slots, d_BMF: (gather_rows(d_BMF, slots), None, None),
)
