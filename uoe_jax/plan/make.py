"""A plan: the compiled step beside the counted memory, the predicted time, and the mesh that would be better."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Iterator, Mapping, NamedTuple

from uoe_jax.config.schema import MESH_AXES, Config, MeshConfig
from uoe_jax.config.validate import check_sizes
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.plan.compiled import Compiled, compile_step
from uoe_jax.plan.hardware import Hardware, Range, find
from uoe_jax.plan.peak import Peak, peak
from uoe_jax.plan.predict import (
    Prediction,
    expected_collectives,
    narrowed,
    network_seconds,
    predict,
    ring,
)

MAX_DEVICES = 512  # host devices that one process compiles for
USABLE = 0.92  # of the memory; the rest is the runtime's, the networks' buffers and what lies between arrays (assumed)
WORTH = 0.03  # of the step's time, from which on another mesh is suggested


class Traffic(NamedTuple):
    """All collectives of one kind over the same mesh axes: runs in a step, bytes that a device sends in it, seconds
    (best, worst; None for `cpu`), and whether they leave the fast network."""

    kind: str
    axes: tuple[str, ...]
    runs: int
    sent: float
    seconds: Range | None
    slow: bool


class Suggestion(NamedTuple):
    """Another mesh of as many devices: its peak in bytes, and its step beside the given mesh's by the same count."""

    mesh: dict[str, int]
    peak: float
    step: Range
    given_step: Range


class Plan(NamedTuple):
    """Bytes are of one device.

    Attributes:
      counted: the memory model under the compiler's assumptions. expected: under the hardware's.
      factor: compiled over counted temporary memory; the expected temporary memory is multiplied by it in `peak`.
      scores: what the peak would be more with the scores of attention held in memory.
      fits, prediction: None for `cpu`, the devices that the step is compiled for.
      suggestion: a mesh that is faster, or that fits where this does not.
      least: where no mesh fits, the one that needs least, and its peak.
    """

    config: Config
    hardware: str
    compiled: Compiled
    counted: Peak
    expected: Peak
    factor: float
    peak: float
    scores: float
    fits: bool | None
    traffic: tuple[Traffic, ...]
    prediction: Prediction | None
    suggestion: Suggestion | None
    least: tuple[dict[str, int], float] | None


def read_mesh(text: str | None, devices: int | None, given: MeshConfig) -> MeshConfig:
    """The mesh of `--mesh=data=8,fsdp=4` (axes left out are 1) or, without it, of the configuration; all sizes settled.

    Raises:
      UserError: what cannot be read, a size that is left open, or more devices than can be compiled for.
    """
    sizes = given.shape if text is None else dict.fromkeys(MESH_AXES, 1)
    seen: set[str] = set()
    for item in () if text is None else text.split(","):
        axis, equals, size = (part.strip() for part in item.partition("="))
        if axis not in MESH_AXES or not equals:
            raise UserError(
                f"--mesh={text}: {item!r} names no axis; give axis=size, of {', '.join(MESH_AXES)}"
            )
        if axis in seen:
            raise UserError(f"--mesh={text}: {axis} is given twice; give it once")
        if size != "-1" and not (size.isdecimal() and int(size)):
            raise UserError(
                f"--mesh={text}: {axis}={size} is no size; give a whole number from 1 on, or -1 for what is left"
            )
        seen.add(axis)
        sizes[axis] = int(size)
    open_axes = [axis for axis in MESH_AXES if sizes[axis] == -1]
    source = f"--mesh={text}" if text is not None else "config.mesh"
    left_open = " and ".join(f"{axis}=-1" for axis in open_axes)
    if len(open_axes) > 1:
        raise UserError(
            f"{source}: {left_open}: only one axis can take what is left of the devices; give the others a size"
        )
    if open_axes and devices is None:
        raise UserError(
            f"{source}: {left_open} takes what is left of the devices; say how many with --devices=N, or give a size"
        )
    total = devices or math.prod(sizes.values())
    if total > MAX_DEVICES:
        remedy = f"the step is compiled here for at most {MAX_DEVICES}; plan fewer along data, with as many rows for each device"
        raise UserError(
            f"{f'--devices={devices}' if devices else source}: {total} devices; {remedy}"
        )
    mesh = _resized(given, sizes)
    if devices is None:
        return mesh
    from uoe_jax.distributed import mesh as mesh_lib

    return _resized(mesh, mesh_lib.sizes(mesh, devices))


def _resized(mesh: MeshConfig, sizes: Mapping[str, int]) -> MeshConfig:
    replica, data, fsdp, expert = (sizes[axis] for axis in MESH_AXES)
    return dataclasses.replace(mesh, replica=replica, data=data, fsdp=fsdp, expert=expert)


def make(config: Config, hardware_name: str) -> Plan:
    """Plans a configuration whose mesh and vocabulary are settled.

    Raises:
      UserError: what the configuration is refused for on this mesh.
    """
    hardware, shape = find(hardware_name), config.mesh.shape
    check_sizes(config, shape)
    # 16-bit arithmetic the CPU compiler turns to float32 with copies around it, which accelerators do not have.
    as_compiled = config if hardware is None else _in_float32(config)
    compiled, counted = compile_step(as_compiled), peak(as_compiled, shape, flash=False)
    factor = compiled.temporary / counted.temporary
    expected = counted if hardware is None else peak(config, shape, flash=True)
    total = compiled.peak - compiled.temporary + factor * expected.temporary
    scores = factor * (peak(config, shape, flash=False).temporary - expected.temporary)
    plan = Plan(
        config, hardware_name, compiled, counted, expected, factor, total, scores, None,
        tuple(_traffic(config, hardware, compiled)), None, None, None,
    )  # fmt: skip
    if hardware is None:
        return plan
    plan = plan._replace(
        fits=total <= USABLE * hardware.memory,
        prediction=predict(config, shape, hardware, compiled.collectives),
    )
    return _with_suggestion(plan, hardware)


def _in_float32(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))


def _traffic(config: Config, hardware: Hardware | None, compiled: Compiled) -> Iterator[Traffic]:
    m, shape = config.model, config.mesh.shape
    moved = sorted((c for c in compiled.collectives if c.axes), key=lambda c: (c.axes, c.kind))
    for (axes, kind), same in itertools.groupby(moved, key=lambda c: (c.axes, c.kind)):
        group = list(same)
        runs = sum({c.name: c.times for c in group}.values())
        if hardware is None:
            yield Traffic(kind, axes, runs, sum(c.sent * c.times for c in group), None, False)
        else:
            seconds, slow = (
                network_seconds(group, shape, hardware, m),
                ring(axes, shape, hardware).bandwidth < hardware.fast,
            )
            yield Traffic(kind, axes, runs, sum(narrowed(c, m) for c in group), seconds, slow)


def _with_suggestion(plan: Plan, hardware: Hardware) -> Plan:
    """Judges every mesh by what can be counted without compiling it, the given one too, so that like meets like."""

    def judged(mesh: MeshConfig) -> tuple[MeshConfig, Range, float]:
        c, shape = dataclasses.replace(plan.config, mesh=mesh), mesh.shape
        found = peak(c, shape, flash=True)
        step = predict(c, shape, hardware, expected_collectives(c, shape)).step
        return mesh, step, found.arguments + plan.factor * found.temporary

    every = [judged(mesh) for mesh in _meshes(plan.config)]
    fitting = [found for found in every if found[2] <= USABLE * hardware.memory]
    if not fitting and not plan.fits:
        mesh, _, needed = min(every, key=lambda found: found[2])
        return plan._replace(least=(mesh.shape, needed))
    given = judged(plan.config.mesh)[1]
    mesh, step, needed = min(
        fitting, key=lambda found: sum(found[1]), default=(plan.config.mesh, given, 0.0)
    )
    if mesh == plan.config.mesh or plan.fits and sum(step) > (1 - WORTH) * sum(given):
        return plan
    return plan._replace(suggestion=Suggestion(mesh.shape, needed, step, given))


def _meshes(config: Config) -> Iterator[MeshConfig]:
    """Every way to lay the devices on data, fsdp and expert that the configuration allows; replica stays."""
    total = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    for fsdp, expert in itertools.product(divisors, divisors):
        if total % (fsdp * expert) == 0:
            mesh = dataclasses.replace(
                config.mesh, data=total // fsdp // expert, fsdp=fsdp, expert=expert
            )
            try:
                check_sizes(config, mesh.shape)
            except ConfigError:
                continue
            yield mesh
