"""`--mesh` of `uoe plan`, read before jax is imported."""

import dataclasses
import math
from typing import Any

from uoe_jax.config.schema import MESH_AXES, MeshConfig
from uoe_jax.errors import UserError

MAX_DEVICES = 512  # host devices that one process compiles for


def read_mesh(text: str | None, devices: int | None, given: MeshConfig) -> MeshConfig:
    """The mesh of `--mesh=data=8,fsdp=4` (other axes are 1), or the configuration's; all sizes set.
    UserError where a size cannot be read or is left open, and for too many devices."""
    sizes: dict[str, Any] = given.shape if text is None else _sizes(text)
    source = "config.mesh" if text is None else f"--mesh={text}"
    open_axes = [f"{axis}=-1" for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        why = "only one axis can take what is left of the devices; give the others a size"
        raise UserError(f"{source}: {' and '.join(open_axes)}: {why}")
    if open_axes and devices is None:
        why = "takes what is left of the devices; say how many with --devices=N, or give a size"
        raise UserError(f"{source}: {open_axes[0]} {why}")
    total = devices or math.prod(sizes.values())
    if total > MAX_DEVICES:
        why = f"{total} devices; the step is compiled here for at most {MAX_DEVICES}"
        remedy = "plan fewer along data, with as many rows for each device"
        raise UserError(f"{f'--devices={devices}' if devices else source}: {why}; {remedy}")
    mesh = dataclasses.replace(given, **sizes)
    if devices is None:
        return mesh
    from uoe_jax.distributed import mesh as mesh_lib

    filled: dict[str, Any] = mesh_lib.sizes(mesh, devices)
    return dataclasses.replace(mesh, **filled)


def _sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, equals, size = (part.strip() for part in item.partition("="))
        why = ""
        if axis not in MESH_AXES or not equals:
            why = f"{item!r} names no axis; give axis=size, of {', '.join(MESH_AXES)}"
        elif axis in sizes:
            why = f"{axis} is given twice; give it once"
        elif size != "-1" and not (size.isdecimal() and int(size)):
            remedy = "give a whole number from 1 on, or -1 for what is left"
            why = f"{axis}={size} is no size; {remedy}"
        if why:
            raise UserError(f"--mesh={text}: {why}")
        sizes[axis] = int(size)
    return dict.fromkeys(MESH_AXES, 1) | sizes
