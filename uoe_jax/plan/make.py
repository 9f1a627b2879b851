"""A plan: the compiled step, the counted memory, the predicted time, and a better mesh."""

import contextlib
import dataclasses
import itertools
from typing import Iterator, NamedTuple

from uoe_jax.config.schema import Config, MeshConfig
from uoe_jax.config.validate import check_sizes
from uoe_jax.errors import ConfigError
from uoe_jax.plan import predict as time
from uoe_jax.plan.compiled import Compiled, compile_step
from uoe_jax.plan.hardware import Hardware, Range, find
from uoe_jax.plan.peak import Peak, peak

USABLE = 0.92  # of the memory; runtime, network buffers and gaps take the rest (assumed)
WORTH = 0.03  # of the step's time that another mesh must save to be suggested


class Traffic(NamedTuple):
    """All collectives of one kind over the same mesh axes in a step."""

    kind: str
    axes: tuple[str, ...]
    runs: int
    sent: float  # bytes that a device sends
    seconds: Range | None  # (best, worst); None for `cpu`
    slow: bool  # whether they leave the fast network


class Suggestion(NamedTuple):
    """Another mesh of as many devices."""

    mesh: dict[str, int]
    peak: float  # bytes
    step: Range  # seconds, as is given_step, that of the given mesh, counted alike
    given_step: Range


class Plan(NamedTuple):
    """Bytes are of one device. What is None for `cpu` is about accelerators."""

    config: Config
    hardware: str
    compiled: Compiled
    counted: Peak  # the memory model under the compiler's assumptions
    expected: Peak  # under the hardware's
    factor: float  # compiled over counted temporary memory; `peak` has the expected times that
    peak: float
    scores: float  # what the peak would grow by with attention scores held in memory
    traffic: tuple[Traffic, ...]
    fits: bool | None = None
    prediction: time.Prediction | None = None
    suggestion: Suggestion | None = None  # a mesh that is faster, or fits where this does not
    least: tuple[dict[str, int], float] | None = None  # none fits: which needs least, and its peak


def make(config: Config, hardware_name: str) -> Plan:
    """Plans a configuration of settled mesh and vocabulary; UserError where it is refused."""
    hardware, shape = find(hardware_name), config.mesh.shape
    check_sizes(config, shape)
    as_compiled = config
    if hardware is not None:  # the CPU compiler turns 16 bits to float32 with copies around it
        m = dataclasses.replace(config.model, dtype="float32")
        as_compiled = dataclasses.replace(config, model=m)
    compiled, counted = compile_step(as_compiled), peak(as_compiled, shape, flash=False)
    factor = compiled.temporary / counted.temporary
    expected = counted if hardware is None else peak(config, shape, flash=True)
    total = compiled.peak - compiled.temporary + factor * expected.temporary
    scores = factor * (peak(config, shape, flash=False).temporary - expected.temporary)
    traffic = tuple(_traffic(config, hardware, compiled))
    plan = Plan(config, hardware_name, compiled, counted, expected, factor, total, scores, traffic)
    if hardware is None:
        return plan
    predicted = time.predict(config, shape, hardware, compiled.collectives)
    plan = plan._replace(fits=total <= USABLE * hardware.memory, prediction=predicted)
    return _with_suggestion(plan, hardware)


def _traffic(config: Config, hardware: Hardware | None, compiled: Compiled) -> Iterator[Traffic]:
    m, shape = config.model, config.mesh.shape
    moved = sorted((c for c in compiled.collectives if c.axes), key=lambda c: (c.axes, c.kind))
    for (axes, kind), same in itertools.groupby(moved, key=lambda c: (c.axes, c.kind)):
        group, seconds, slow = list(same), None, False
        sent = sum(c.sent * c.times for c in group)
        if hardware is not None:
            sent = sum(time.sent_bytes(c, m) for c in group)
            seconds = time.network_seconds(group, shape, hardware, m)
            slow = time.ring(axes, shape, hardware).bandwidth < hardware.fast
        runs = sum({c.name: c.times for c in group}.values())
        yield Traffic(kind, axes, runs, sent, seconds, slow)


def _with_suggestion(plan: Plan, hardware: Hardware) -> Plan:
    """Compares all meshes, the given one too, by what can be counted without compiling them."""

    def judged(mesh: MeshConfig) -> tuple[MeshConfig, Range, float]:
        c, shape = dataclasses.replace(plan.config, mesh=mesh), mesh.shape
        found = peak(c, shape, flash=True)
        step = time.predict(c, shape, hardware, time.expected_collectives(c, shape)).step
        return mesh, step, found.arguments + plan.factor * found.temporary

    own = plan.config.mesh
    every = [judged(mesh) for mesh in _meshes(plan.config)]
    fitting = [found for found in every if found[2] <= USABLE * hardware.memory]
    if not fitting and not plan.fits:
        mesh, _, needed = min(every, key=lambda found: found[2])
        return plan._replace(least=(mesh.shape, needed))
    given = judged(own)[1]
    mesh, step, needed = min(fitting, key=lambda x: sum(x[1]), default=(own, given, 0.0))
    if mesh == own or plan.fits and sum(step) > (1 - WORTH) * sum(given):
        return plan
    return plan._replace(suggestion=Suggestion(mesh.shape, needed, step, given))


def _meshes(config: Config) -> Iterator[MeshConfig]:
    """Every division of the devices over data, fsdp and expert that the configuration allows."""
    total = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    for fsdp, expert in itertools.product(divisors, divisors):
        data, rest = divmod(total, fsdp * expert)
        if not rest:
            mesh = dataclasses.replace(config.mesh, data=data, fsdp=fsdp, expert=expert)
            with contextlib.suppress(ConfigError):
                check_sizes(config, mesh.shape)
                yield mesh
