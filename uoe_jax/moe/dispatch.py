"""Slots: which patch is where (`Selection`), and moving patches to slots and results back.

`gather_slots` and `combine_slots` are each the transpose of the other. Backends (`backend_for`):

- `inverse` only gathers, forward and backward, through the inverse slot map: no atomics,
  deterministic, summed in float32.
- `scatter` lets autodiff turn the gather into a scatter-add and back.
- `onehot` multiplies by a matrix of zeros and ones, for devices whose gathers are slow: 2·N·C·M·X
  operations each way and a matrix [N,B,C,M], so for large patches, which are few.

Letters in `layers.common`; X is the P·D values of a patch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

BACKENDS = ("inverse", "scatter", "onehot")


class Selection(NamedTuple):
    """Which patches each expert works on; all int32 but for validity and weights."""

    slots_NRC: Array  # the patch in each slot, ascending; empty slots hold 0 and come last
    valid_NRC: Array  # bool, whether the slot is filled
    weights_NRC: Array  # float32 combine weight, 0 in empty slots
    slot_of_BMN: Array  # the inverse of the slots: a patch's slot in each expert, C if it has none
    sequence_NR: Array  # the row of the batch in each row of an expert's buffer; 0 in unused rows
    row_of_BN: Array  # the inverse: a batch row's buffer row in each expert, R if it has none

    @property
    def kept_BMN(self) -> Array:
        """bool, whether an expert took a patch."""
        return self.slot_of_BMN < self.slots_NRC.shape[-1]

    @property
    def patch_NRC(self) -> Array:
        """The patch in each slot, as an index into [B·M]."""
        return _patches(self.slots_NRC, self.sequence_NR, self.slot_of_BMN.shape[1])

    @property
    def place_BMN(self) -> Array:
        """The slot of each patch, as an index into [R·C]; R·C where it has none."""
        return _places(self.slot_of_BMN, self.row_of_BN, *self.slots_NRC.shape[1:])


def _patches(slots_NRC: Array, sequence_NR: Array, m: int) -> Array:
    return sequence_NR[..., None] * m + slots_NRC


def _places(slot_of_BMN: Array, row_of_BN: Array, r: int, c: int) -> Array:
    return jnp.where(slot_of_BMN < c, row_of_BN[:, None] * c + slot_of_BMN, r * c)


Rows = tuple[Array, Array]  # (sequence_NR, row_of_BN) of a `Selection`


def all_sequences(b: int, n: int) -> Rows:
    """Every expert's buffer has all rows of the batch, in order."""
    rows = jnp.arange(b, dtype=jnp.int32)
    return jnp.broadcast_to(rows[None], (n, b)), jnp.broadcast_to(rows[:, None], (b, n))


class Decision(NamedTuple):
    """Who takes what, before it is listed by slot."""

    kept_BMN: Array  # bool, whether an expert takes a patch; at most `slots` of a row
    weights_BMN: Array  # float32, the combine weight of every patch in every expert
    slots: int  # C
    rows: Rows | None  # under `sequence_capacity_factor`; None: all rows

    def of_experts(self, first: Array | int, n: int) -> "Decision":
        """The decision of the experts [first, first + n)."""
        own = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=n)
        rows = None if self.rows is None else (own(self.rows[0], axis=0), own(self.rows[1], axis=1))
        return Decision(own(self.kept_BMN, axis=2), own(self.weights_BMN, axis=2), self.slots, rows)

    def pack(self) -> Selection:
        """Numbers the kept patches of each expert in ascending order and lists them by slot."""
        (b, m, n), c = self.kept_BMN.shape, self.slots
        at = functools.partial(jnp.arange, dtype=jnp.int32)
        sequence_NR, row_of_BN = self.rows or all_sequences(b, n)
        r = sequence_NR.shape[1]
        number_BMN = jnp.cumsum(self.kept_BMN, axis=1, dtype=jnp.int32) - 1
        slot_of_BMN = jnp.where(self.kept_BMN, number_BMN, c)
        filled_BN = self.kept_BMN.sum(axis=1, dtype=jnp.int32)
        # An unused buffer row names batch row 0, which is in another row of this expert or in none.
        held_NR = jnp.take_along_axis(row_of_BN.T, sequence_NR, axis=1) == at(r)[None]
        filled_NR = jnp.where(held_NR, jnp.take_along_axis(filled_BN.T, sequence_NR, axis=1), 0)
        valid_NRC = at(c)[None, None] < filled_NR[..., None]
        # Every kept patch writes its own slot; the others write past the end and are dropped.
        place = (at(n)[None] * r + row_of_BN)[:, None], slot_of_BMN
        patch_BMN = jnp.broadcast_to(at(m)[None, :, None], (b, m, n))
        slots = jnp.zeros((n * r, c), jnp.int32).at[place].set(patch_BMN, mode="drop")
        maps = (slots.reshape(n, r, c), valid_NRC, slot_of_BMN, sequence_NR, row_of_BN)
        # Saved for the backward pass: recomputed, a near tie might fall the other way there.
        slots_NRC, valid_NRC, slot_of_BMN, sequence_NR, row_of_BN = (
            checkpoint_name(a, "selection") for a in maps
        )
        weights_NBM1 = jnp.transpose(self.weights_BMN, (2, 0, 1))[..., None]
        index = _patches(slots_NRC, sequence_NR, m), _places(slot_of_BMN, row_of_BN, r, c)
        own_NRC = _gather_own(weights_NBM1, *index)[..., 0]
        weights_NRC = checkpoint_name(jnp.where(valid_NRC, own_NRC, 0), "selection")
        return Selection(slots_NRC, valid_NRC, weights_NRC, slot_of_BMN, sequence_NR, row_of_BN)


def backend_for(name: str, dtype: jnp.dtype, patch_size: int, bounded: bool) -> str:
    """Resolves `auto` for the device that jax runs on."""
    # Scatter-add was faster only for 16-bit values on CPUs, where gathers convert one by one. Large
    # patches make the one-hot product cheap on TPUs (not measured), unless rows are `bounded`.
    if name != "auto":
        return name
    platform = jax.default_backend()
    if platform == "tpu" and patch_size >= 16 and not bounded:
        return "onehot"
    return "scatter" if platform == "cpu" and jnp.dtype(dtype).itemsize == 2 else "inverse"


def gather_slots(x_BMX: Array, selection: Selection, backend: str) -> Array:
    """The patches in each expert's slots, [N,R,C,X]; empty slots are unspecified, but finite."""
    if backend == "inverse":
        return _gather(x_BMX, selection.patch_NRC, selection.place_BMN)
    if backend == "onehot":
        return _one_hot_product("nbcm,bmf->nbcf", selection, x_BMX)
    rows_XY = x_BMX.reshape(-1, x_BMX.shape[-1])
    return rows_XY.at[_patch_or_none(selection)].get(mode="fill", fill_value=0)


def gather_own(a_NBMX: Array, selection: Selection, backend: str) -> Array:
    """Every expert's own values of its patches, [N,B,M,X] to [N,R,C,X]; empty slots unspecified."""
    if backend == "inverse":
        return _gather_own(a_NBMX, selection.patch_NRC, selection.place_BMN)
    if backend == "onehot":
        return _one_hot_product("nbcm,nbmf->nbcf", selection, a_NBMX)
    n, b, m, f = a_NBMX.shape
    rows = jax.vmap(lambda a_XY, patch_RC: a_XY.at[patch_RC].get(mode="fill", fill_value=0))
    return rows(a_NBMX.reshape(n, b * m, f), _patch_or_none(selection))


def combine_slots(y_NRCX: Array, selection: Selection, backend: str) -> Array:
    """Sums the experts' results at their patches, [B,M,X]; empty slots add nothing."""
    if backend == "inverse":
        return _combine(y_NRCX, selection.patch_NRC, selection.place_BMN)
    if backend == "onehot":
        return _one_hot_product("nbcm,nbcf->bmf", selection, y_NRCX)
    (b, m, _), f = selection.slot_of_BMN.shape, y_NRCX.shape[-1]
    out = jnp.zeros((b * m, f), y_NRCX.dtype).at[_patch_or_none(selection)].add(y_NRCX, mode="drop")
    return out.reshape(b, m, f)


def _patch_or_none(selection: Selection) -> Array:
    """[N,R,C] index of each slot's patch in [B·M], past the end for empty slots."""
    b, m, _ = selection.slot_of_BMN.shape
    return jnp.where(selection.valid_NRC, selection.patch_NRC, b * m)


def _one_hot_product(subscripts: str, selection: Selection, values: Array) -> Array:
    """Values times the [N,B,C,M] zeros and ones of which slot holds which patch: exact."""
    # A value that is not finite spreads over its row; those of empty slots are left out.
    valid_NRC1, of_slots = selection.valid_NRC[..., None], subscripts.endswith("bmf")
    patch_M = jnp.arange(selection.slot_of_BMN.shape[1], dtype=jnp.int32)
    held_NBCM = (selection.slots_NRC[..., None] == patch_M[None, None, None]) & valid_NRC1
    values = jnp.where(valid_NRC1, values, 0) if of_slots else values
    # A TPU would round float32 values to bfloat16 in a product of the default precision.
    exact = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    y = jnp.einsum(subscripts, held_NBCM.astype(values.dtype), values, precision=exact)
    return y if of_slots else jnp.where(valid_NRC1, y, 0)


def gather_rows(x_BMX: Array, patch_NRC: Array) -> Array:
    """Rows of patches, [N,R,C,X], at indices into [B·M]; for values without a gradient."""
    rows_XY = jnp.asarray(x_BMX).reshape(-1, x_BMX.shape[-1])
    return rows_XY.at[patch_NRC].get(mode="promise_in_bounds")


def _sum_slots(y_NRCX: Array, place_BMN: Array) -> Array:
    n, r, c, f = y_NRCX.shape
    y = y_NRCX.reshape(n * r * c, f)
    total = jnp.zeros((*place_BMN.shape[:2], f), jnp.float32 if y.dtype.itemsize < 4 else y.dtype)
    # Unrolled over experts: one fused loop of gathers. A single gather would materialise [N,B,M,X].
    for i in range(n):
        place_BM = place_BMN[..., i]
        row_BMX = y.at[jnp.minimum(place_BM, r * c - 1) + i * r * c].get(mode="promise_in_bounds")
        total = total + jnp.where((place_BM < r * c)[..., None], row_BMX, 0).astype(total.dtype)
    return total.astype(y_NRCX.dtype)


def _by_pairs(x_BMX: Array, patch_NRC: Array) -> Array:
    """`gather_rows`; on GPUs two 16-bit values at a time, measured 1.3 times as fast."""
    if jax.default_backend() != "gpu" or x_BMX.dtype.itemsize != 2 or x_BMX.shape[-1] % 2:
        return gather_rows(x_BMX, patch_NRC)
    pairs = jax.lax.bitcast_convert_type(x_BMX.reshape(*x_BMX.shape[:-1], -1, 2), jnp.uint32)
    rows = jax.lax.bitcast_convert_type(gather_rows(pairs, patch_NRC), x_BMX.dtype)
    return rows.reshape(*patch_NRC.shape, -1)


@jax.custom_vjp
def _gather(x_BMX, patch_NRC, place_BMN):
    return _by_pairs(x_BMX, patch_NRC)


@jax.custom_vjp
def _combine(y_NRCX, patch_NRC, place_BMN):
    return _sum_slots(y_NRCX, place_BMN)


# Only the integer maps are saved. An empty slot gets the gradient of some patch: harmless, as
# its combine weight is 0, and cheaper than a mask.
_gather.defvjp(
    lambda x, patch, place: (_by_pairs(x, patch), place),
    lambda place, d_NRCX: (_sum_slots(d_NRCX, place), None, None),
)
_combine.defvjp(
    lambda y, patch, place: (_sum_slots(y, place), patch),
    lambda patch, d_BMX: (_by_pairs(d_BMX, patch), None, None),
)


def _own_rows(a_NXYZ: Array, index: Array) -> Array:
    """[N,…,Z]: of each expert's rows, those at its own indices [N,…] into X·Y."""
    n, x, y, z = a_NXYZ.shape
    first_N = x * y * jnp.arange(n, dtype=jnp.int32).reshape(n, *(1,) * (index.ndim - 1))
    return a_NXYZ.reshape(n * x * y, z).at[index + first_N].get(mode="promise_in_bounds")


@jax.custom_vjp
def _gather_own(a_NBMX, patch_NRC, place_BMN):
    return _own_rows(a_NBMX, patch_NRC)


def _gather_own_bwd(place_BMN, d_NRCX):
    """No sum over experts: a patch takes the gradient of its own slot in each expert, or 0."""
    places, place_NBM = d_NRCX.shape[1] * d_NRCX.shape[2], jnp.transpose(place_BMN, (2, 0, 1))
    d_NBMX = _own_rows(d_NRCX, jnp.minimum(place_NBM, places - 1))
    return jnp.where((place_NBM < places)[..., None], d_NBMX, 0).astype(d_NRCX.dtype), None, None


_gather_own.defvjp(lambda a, patch, place: (_own_rows(a, patch), place), _gather_own_bwd)
