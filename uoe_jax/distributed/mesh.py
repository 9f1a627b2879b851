"""The one place a mesh is made, and the one that says how arrays lie on it.

All four axes are always there, of size 1 where unused: `replica` (slow network), `data`, `fsdp` (rows and weights),
`expert` (partitions of a block). The batch is cut over the first three.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from uoe_jax.config.schema import MESH_AXES, MeshConfig
from uoe_jax.errors import ConfigError

AXES = MESH_AXES
BATCH_AXES = ("replica", "data", "fsdp")
ROWS = PartitionSpec(BATCH_AXES)
EVERYWHERE = PartitionSpec()

# Logical axis of a weight (layers.common.weight) to mesh axis; a dimension without a name is not cut.
RULES = {
    "expert": "expert",
    "hidden": "expert",
    "heads": "expert",
    "vocab": "expert",
    "embed": "fsdp",
}
# Vocabularies come as they are: one that the axis does not divide stays whole. Everything else is checked (`checks.check_sizes`).
MAY_STAY_WHOLE = ("vocab",)

_sequence_parallel = jax.make_user_context(False)
_by_partitioner = jax.make_user_context(False)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the configured sizes over all devices, one -1 filled in.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or no batch axis can span the slow network.
    """
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(
        arrange(devices, sizes(config, len(devices))), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def abstract_mesh(config: MeshConfig, n_devices: int) -> AbstractMesh:
    """The mesh without devices, for lowering; raises as `make_mesh`."""
    shape = tuple(sizes(config, n_devices).values())
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """The size of every axis over so many devices, one -1 filled in; raises ConfigError where they do not fit."""
    found = config.shape
    fixed = math.prod(s for s in found.values() if s != -1)
    free = [axis for axis, size in found.items() if size == -1]
    if n_devices % fixed or (not free and fixed != n_devices):
        shape = ", ".join(f"{a}={s}" for a, s in found.items())
        name = max((a for a in AXES if found[a] != -1), key=lambda a: found[a])
        need = f"a multiple of {fixed}" if free else fixed
        raise ConfigError(
            f"config.mesh.{name}",
            found[name],
            f"the mesh {shape} needs {need} devices and there are {n_devices}",
        )
    return {axis: n_devices // fixed if size == -1 else size for axis, size in found.items()}


def arrange(devices: Sequence[Any], shape: Mapping[str, int]) -> np.ndarray:
    """The devices in the order of the mesh, so that the inner axes stay on the fast network.

    Devices that a fast network joins have one `slice_index` (a TPU slice, the GPUs of one machine); on CPUs, one process.
    Several such groups are spread over the outermost axes that their number has factors in common with: `replica` where
    it is used, and `expert` only where all others are too small.

    Raises:
      ConfigError: the groups cannot be spread so, or the network within one cannot be cut so.
    """
    by_process = any(
        d.platform == "cpu" or getattr(d, "slice_index", None) is None for d in devices
    )
    groups = len({d.process_index if by_process else d.slice_index for d in devices})
    left, slow = groups, {}
    for axis in AXES:
        slow[axis] = math.gcd(left, shape[axis])
        left //= slow[axis]
    written = ", ".join(f"{a}={s}" for a, s in shape.items())
    if left > 1:
        remedy = (
            f"{groups} {'processes' if by_process else 'slices'} are joined by a slow network and cannot be spread "
            f"over the mesh {written}; give replica a multiple of {groups}"
        )
        raise ConfigError("config.mesh.replica", shape["replica"], remedy)
    fast = tuple(shape[a] // slow[a] for a in AXES)
    try:
        if groups == 1:
            return mesh_utils.create_device_mesh(fast, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(
            fast,
            tuple(slow.values()),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    except (NotImplementedError, ValueError) as error:
        largest = max(AXES, key=lambda a: shape[a])
        remedy = (
            f"the network of these devices cannot be cut as {written} ({error}); choose other sizes"
        )
        raise ConfigError(f"config.mesh.{largest}", shape[largest], remedy) from error


def current() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` made current; None where there is none, or only one device, which has nothing to share,
    or the partitioner is to do it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or _by_partitioner.value else mesh


def by_partitioner() -> contextlib.AbstractContextManager[Any]:
    """While entered, blocks are not cut by hand: for decoding, whose few rows need not fit the batch axes."""
    return _by_partitioner(True)


def is_cut(logical: str, size: int) -> bool:
    """Whether a dimension of a weight is cut over the current mesh."""
    mesh = current()
    return mesh is not None and weight_spec(mesh, (logical,), (size,)) != PartitionSpec(None)


def sequence_parallel(on: bool) -> contextlib.AbstractContextManager[Any]:
    """While entered: between blocks, activations are cut along L over `expert`."""
    return _sequence_parallel(on)


def activations(mesh: AbstractMesh) -> PartitionSpec:
    """How activations [B,L,…] lie between blocks."""
    return PartitionSpec(BATCH_AXES, "expert" if is_sequence_parallel(mesh) else None)


def is_sequence_parallel(mesh: AbstractMesh) -> bool:
    return bool(_sequence_parallel.value) and mesh.shape["expert"] > 1


def placed_activations(x_BLD: jax.Array) -> jax.Array:
    """The same activations, said to lie on the current mesh as they must between blocks."""
    mesh = current()
    return x_BLD if mesh is None else jax.lax.with_sharding_constraint(x_BLD, activations(mesh))


def everywhere(x: jax.Array) -> jax.Array:
    """The same values, said to be whole on every device of the current mesh, so that every process can read them."""
    return (
        x
        if jax.sharding.get_abstract_mesh().empty
        else jax.lax.with_sharding_constraint(x, EVERYWHERE)
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over replica, data and fsdp."""
    return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, EVERYWHERE)


def weight_sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding:
    """How a weight lies on the mesh (`weight_spec`)."""
    return NamedSharding(mesh, weight_spec(mesh, axes, shape))


def weight_spec(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> PartitionSpec:
    """How a weight is cut: by `RULES`. A leading axis beyond `axes` is the stack of layers and is not cut.

    Raises:
      ValueError: two axes of the weight fall on one of the mesh, or the mesh does not divide a dimension.
    """
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :]):
        axis = RULES.get(logical or "")
        if axis is not None and axis in spec:
            raise ValueError(
                f"two axes of a weight with axes {axes} fall on the mesh axis {axis!r}"
            )
        parts = 1 if axis is None else mesh.shape[axis]
        if size % parts:
            if logical not in MAY_STAY_WHOLE:
                raise ValueError(
                    f"axis {logical!r} of size {size} cannot be cut in {parts} over the mesh axis {axis!r}"
                )
            parts = 1
        spec.append(axis if parts > 1 else None)
    return PartitionSpec(*spec)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts the batch is cut in."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch that this process holds, ascending."""
    spans = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[_of_rows(span)] for span in spans]))


def _of_rows(index: tuple[slice, ...] | None) -> slice:
    assert index is not None  # a NamedSharding knows the part of every device
    return index[0]


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process holds (`local_rows`)."""
    parts, own_parts = batch_parts(mesh), local_rows(mesh, batch_parts(mesh))

    def put(own: np.ndarray) -> jax.Array:
        rows = len(own) // len(own_parts) * parts
        held = local_rows(mesh, rows)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return own[np.searchsorted(held, np.arange(rows)[_of_rows(index)])]

        return jax.make_array_from_callback((rows, *own.shape[1:]), batch_sharding(mesh), part)

    with jax.transfer_guard("allow"):  # what is meant to be transferred
        return {name: put(own) for name, own in batch.items()}
