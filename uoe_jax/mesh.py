"""The one place a mesh is made, and the one that says how arrays lie on it.

All four axes are always there, of size 1 where unused: `replica` (slow network), `data`, `fsdp` (rows and weights),
`expert` (partitions of a block). The batch is cut over the first three.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError

AXES = ("replica", "data", "fsdp", "expert")
BATCH_AXES = ("replica", "data", "fsdp")

# Logical axis of a weight (layers.common.weight) to mesh axis; what is not named here is not cut.
RULES = {"expert": "expert", "hidden": "expert", "heads": "expert", "vocab": "expert", "embed": "fsdp"}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of the configured sizes over all devices, one -1 filled in.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(s for s in sizes.values() if s != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not free and fixed != len(devices)):
        shape = ", ".join(f"{a}={s}" for a, s in sizes.items())
        name = max((a for a in AXES if sizes[a] != -1), key=lambda a: sizes[a])
        remedy = f"the mesh {shape} needs a multiple of {fixed} devices and there are {len(devices)}"
        raise ConfigError(f"config.mesh.{name}", sizes[name], remedy)
    if free:
        sizes[free[0]] = len(devices) // fixed
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over replica, data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def weight_sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """How a weight lies on the mesh: by `RULES`, each mesh axis used once (the first logical axis that asks for it),
    and only where it divides the dimension. A leading axis beyond `axes` is the stack of layers and is not cut."""
    spec: list[str | None] = [None] * (len(shape) - len(axes))
    for logical, size in zip(axes, shape[len(spec) :]):
        axis = RULES.get(logical or "")
        usable = axis is not None and axis not in spec and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
        spec.append(axis if usable else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_parts(mesh: Mesh) -> int:
    """The number of parts the batch is cut in."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_rows(mesh: Mesh, rows: int, key: str) -> None:
    """Refuses a number of rows that cannot be cut evenly over the batch axes."""
    parts = batch_parts(mesh)
    if rows % parts:
        raise ConfigError(key, rows, f"must be a multiple of replica*data*fsdp={parts}, the parts the batch is cut in")


def local_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """The rows [lo, hi) of a global batch that this process holds."""
    spans = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    bounds = [(span[0].start or 0, rows if span[0].stop is None else span[0].stop) for span in spans]
    return min(lo for lo, _ in bounds), max(hi for _, hi in bounds)


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Global arrays from this process's rows."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
