"""The mesh, and the sharding of every kind of array on it.

All four axes always exist, of size 1 where unused: `replica` (slow network), `data`, `fsdp` (rows
and weights), `expert` (partitions of a block). The batch is sharded over the first three.
"""

import math
from contextlib import AbstractContextManager
from typing import Any, Mapping, Sequence

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from uoe_jax.config.schema import MESH_AXES, MeshConfig
from uoe_jax.errors import ConfigError

AXES = MESH_AXES
BATCH_AXES = ("replica", "data", "fsdp")
ROWS = PartitionSpec(BATCH_AXES)
EVERYWHERE = PartitionSpec()
Axes = tuple[str | None, ...]  # the logical axes of a weight
AnyMesh = Mesh | AbstractMesh

# Logical axis of a weight (`layers.weights.weight`) to mesh axis; others are not sharded.
RULES = dict(expert="expert", hidden="expert", heads="expert", vocab="expert", embed="fsdp")
MAY_STAY_WHOLE = ("vocab",)  # where the mesh does not divide it; `config.validate` checks others

sequence_parallel = jax.make_user_context(False)  # activations are sharded along L over `expert`
_by_partitioner = jax.make_user_context(False)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the configured sizes (`sizes`) over all devices, in the order of `arrange`."""
    devices = jax.devices() if devices is None else list(devices)
    arranged = arrange(devices, sizes(config, len(devices)))
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: MeshConfig, n_devices: int) -> AbstractMesh:
    """The mesh without devices, for lowering."""
    shape = tuple(sizes(config, n_devices).values())
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """The size of every axis; -1 takes the rest. ConfigError where the devices do not fit."""
    found = config.shape
    fixed = math.prod(s for s in found.values() if s != -1)
    free = [axis for axis, size in found.items() if size == -1]
    if n_devices % fixed or (not free and fixed != n_devices):
        name = max((a for a in AXES if found[a] != -1), key=lambda a: found[a])
        need = f"a multiple of {fixed}" if free else fixed
        remedy = f"the mesh {_written(found)} needs {need} devices and there are {n_devices}"
        raise ConfigError(f"config.mesh.{name}", found[name], remedy)
    return {axis: n_devices // fixed if size == -1 else size for axis, size in found.items()}


def _written(shape: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in shape.items())


def arrange(devices: Sequence[Any], shape: Mapping[str, int]) -> np.ndarray:
    """The devices in the order of the mesh, with the inner axes on the fast network.

    Devices on one fast network share a `slice_index` (a TPU slice, the GPUs of one machine); on
    CPUs, a process. Several such groups are spread over the outermost axes whose size has a factor
    in common with their number. ConfigError where they, or the network within one, do not fit.
    """
    no_slice = (d.platform == "cpu" or getattr(d, "slice_index", None) is None for d in devices)
    by_process = any(no_slice)
    groups = len({d.process_index if by_process else d.slice_index for d in devices})
    left, slow = groups, {}
    for axis in AXES:
        slow[axis] = math.gcd(left, shape[axis])
        left //= slow[axis]
    if left > 1:
        joined = f"{groups} {'processes' if by_process else 'slices'} are joined by a slow network"
        problem = f"{joined} and cannot be spread over the mesh {_written(shape)}"
        remedy = f"{problem}; give replica a multiple of {groups}"
        raise ConfigError("config.mesh.replica", shape["replica"], remedy)
    fast = tuple(shape[a] // slow[a] for a in AXES)
    split = dict(allow_split_physical_axes=True)
    try:
        if groups == 1:
            return mesh_utils.create_device_mesh(fast, devices, **split)
        return mesh_utils.create_hybrid_device_mesh(
            fast, tuple(slow.values()), devices, process_is_granule=by_process, **split
        )
    except (NotImplementedError, ValueError) as error:
        largest = max(AXES, key=lambda a: shape[a])
        problem = f"the network of these devices cannot be cut as {_written(shape)} ({error})"
        remedy = f"{problem}; choose other sizes"
        raise ConfigError(f"config.mesh.{largest}", shape[largest], remedy) from error


def current() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`; None without one, with one device, or within `by_partitioner`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or _by_partitioner.value else mesh


def by_partitioner() -> AbstractContextManager[Any]:
    """Within it, blocks are sharded by the compiler: decoding's few rows may not fit batch axes."""
    return _by_partitioner(True)


def is_sharded(logical: str, size: int) -> bool:
    """Whether an axis of a weight is sharded over the current mesh."""
    mesh = current()
    return mesh is not None and weight_spec(mesh, (logical,), (size,)) != PartitionSpec(None)


def activations(mesh: AbstractMesh) -> PartitionSpec:
    """The sharding of activations [B,L,…] between blocks."""
    sequence = sequence_parallel.value and mesh.shape["expert"] > 1
    return PartitionSpec(BATCH_AXES, "expert" if sequence else None)


def constrain_activations(x_BLD: Array) -> Array:
    """The same activations, constrained to their sharding between blocks."""
    mesh = current()
    return x_BLD if mesh is None else jax.lax.with_sharding_constraint(x_BLD, activations(mesh))


def everywhere(x: Array) -> Array:
    """The same values, constrained to be whole on every device, so that every process can read."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, EVERYWHERE)


def weight_sharding(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, weight_spec(mesh, axes, shape))


def weight_spec(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    """The sharding of a weight, by `RULES`; an axis before `axes` is that of layers: whole."""
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :]):
        axis = RULES.get(logical or "")
        if axis is not None and axis in spec:
            raise ValueError(f"two axes of a weight with axes {axes} have the mesh axis {axis!r}")
        shards = 1 if axis is None else mesh.shape[axis]
        if size % shards and logical not in MAY_STAY_WHOLE:
            over = f"in {shards} over the mesh axis {axis!r}"
            raise ValueError(f"axis {logical!r} of size {size} cannot be cut {over}")
        spec.append(axis if shards > 1 and size % shards == 0 else None)
    return PartitionSpec(*spec)


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The rows of a global batch that this process holds, ascending."""
    spans = NamedSharding(mesh, ROWS).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[span] for span in spans]))


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Array]:
    """Global arrays from the rows that this process holds (`local_rows`)."""
    sharding, shards = NamedSharding(mesh, ROWS), math.prod(mesh.shape[a] for a in BATCH_AXES)
    own_shards = len(local_rows(mesh, shards))

    def put(own: np.ndarray) -> Array:
        rows = len(own) // own_shards * shards
        held = local_rows(mesh, rows)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # a NamedSharding has one for every device
            return own[np.searchsorted(held, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *own.shape[1:]), sharding, shard)

    with jax.transfer_guard("allow"):  # this transfer is meant
        return {name: put(own) for name, own in batch.items()}
