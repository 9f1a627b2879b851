"""How long a network takes for the collectives of a step."""

import itertools
import math
from typing import Iterable, Mapping, NamedTuple

from uoe_jax.config.schema import ModelConfig
from uoe_jax.costs.memory import ITEM_SIZE
from uoe_jax.plan.hardware import Hardware, Range
from uoe_jax.plan.hlo import Collective

Shape = Mapping[str, int]  # sizes of the mesh axes, in the mesh's order


def devices(shape: Shape) -> int:
    return math.prod(shape.values())


def sent_bytes(moved: Collective, m: ModelConfig) -> float:
    """Bytes a device sends in a step for a collective of the float32 step, at the dtype of `m`.

    Activations over `expert` and gathered weights are in the compute dtype, gradients and sums in
    float32. (Where the vocabulary's gradient of an adaptive softmax crosses `expert` alone, it is
    taken for activations.)
    """
    narrow = moved.axes == ("expert",) or moved.kind == "all-gather"
    return moved.sent * moved.times * (ITEM_SIZE[m.dtype] / 4 if narrow else 1)


def network_seconds(
    moved: Iterable[Collective], shape: Shape, hardware: Hardware, m: ModelConfig
) -> Range:
    """(best, worst) seconds of collectives one after the other; at best no hop costs time."""
    best = worst = 0.0
    latency = {}
    for c in moved:
        r = ring(c.axes, shape, hardware)
        sent = sent_bytes(c, m) / r.bandwidth
        best, worst = best + sent / hardware.network[1], worst + sent / hardware.network[0]
        latency[c.name] = c.times * (r.tree if c.kind == "all-reduce" else r.once)
    return best, worst + sum(latency.values())


class Ring(NamedTuple):
    bandwidth: float  # bytes/s a device sends
    once: float  # seconds of an empty message around it
    tree: float  # and up and down a tree


def ring(axes: tuple[str, ...], shape: Shape, hardware: Hardware) -> Ring:
    """The ring over mesh axes; devices are numbered with `expert` innermost.

    A ring leaves a fast domain once, over the slow links of all its members there. `replica` is for
    the slow network, so no domain spans it.
    """
    domain = min(hardware.domain, devices(shape) // shape["replica"])
    names, offsets = list(shape), []
    for axis in axes:
        stride = math.prod(shape[a] for a in names[names.index(axis) + 1 :])
        offsets.append(range(0, stride * shape[axis], stride))
    members = [sum(place) for place in itertools.product(*offsets)]
    local = sum(member < domain for member in members)
    domains = math.ceil(len(members) / local)
    fast, slow = hardware.hops
    return Ring(
        bandwidth=hardware.fast if domains == 1 else min(hardware.fast, hardware.slow * local),
        once=(len(members) - domains) * fast + (domains > 1) * domains * slow,
        tree=2 * (math.log2(local) * fast + math.log2(domains) * slow),
    )
