"""The collectives that a step needs on a mesh, counted from sizes alone.

`uoe plan` compares meshes by this count, as compiling each would take minutes. The planned mesh's
own time is predicted from its compiled collectives (`hlo`).
"""

from __future__ import annotations

import math
from typing import Iterator

from uoe_jax.config.schema import Config
from uoe_jax.costs.memory import classifier_parameters, layer_parameters, vocabulary_parameters
from uoe_jax.plan.hlo import Array, Collective
from uoe_jax.plan.network import Shape
from uoe_jax.plan.predict import rows, scoring_replicas, vocabulary_shards


def expected_collectives(c: Config, shape: Shape) -> list[Collective]:
    """Activations over `expert`, weights and gradients over the other axes; no small arrays."""
    found: list[Collective] = []
    for kind, elements, axes, runs in _moves(c, shape):
        group, times = math.prod(shape[a] for a in axes), runs * c.train.accumulation
        if group > 1 and times:
            whole, part = (Array("f32", (round(n),)) for n in (elements, elements / group))
            before = part if kind == "all-gather" else whole
            after = part if kind == "reduce-scatter" else whole
            name = f"{len(found)}"
            found.append(Collective(kind, before, after, axes, group, times, True, "", name))
    return found


def _moves(c: Config, shape: Shape) -> Iterator[tuple[str, float, tuple[str, ...], int]]:
    """(kind, elements of the whole array, axes, runs in a microbatch)."""
    m, e, sequence_parallel = c.model, shape["expert"], c.mesh.sequence_parallel
    # Looked up, and (language) scored. A classifier's stem for images and its head are replicated.
    uses = (m.stem == "tokens") + (m.task == "language")
    shards = vocabulary_shards(m, e) if uses else 1
    stream, layer = rows(c, shape) * m.block_length * m.d_model, layer_parameters(m) / e
    again = m.remat in ("dots", "block")  # the state between attention and MLP is recomputed
    sums = m.n_layers * (4 + again) + uses * (shards > 1)
    if sequence_parallel:  # a sum is a scatter and, before the next block, a gather, also backward
        gathers = m.n_layers * (4 + 2 * (m.remat != "none")) + uses * (shards > 1)
        yield "all-gather", stream, ("expert",), gathers
        yield "reduce-scatter", stream, ("expert",), sums
    else:
        yield "all-reduce", stream, ("expert",), sums
    own = ("expert",) if sequence_parallel else ()  # gradients of a device's own tokens are summed
    read = own if shards == 1 else ()
    scored = ("expert",) if m.cutoffs and scoring_replicas(c, e) == 1 else read
    if scored and not sequence_parallel:
        yield "all-gather", stream, ("expert",), 1  # of the gradient
    entries, learned = vocabulary_parameters(m) / shards, m.position == "learned"
    for elements, gathers, gradients, over in (
        (layer, (1 if m.remat == "none" else 2) * m.n_layers, m.n_layers, ()),
        (entries, min(uses, 1) if m.tie_embeddings else uses, uses > 0, read),
        (entries, 0, m.task == "language", scored),
        (m.block_length * m.d_model, learned, learned, own),
    ):
        yield "all-gather", elements, ("fsdp",), gathers
        yield "reduce-scatter", elements, ("fsdp",), gradients
        yield "all-reduce", elements / shape["fsdp"], _used(shape, *over), gradients
    yield "all-reduce", classifier_parameters(m), _used(shape, "fsdp"), 1


def _used(shape: Shape, *more: str) -> tuple[str, ...]:
    """The batch axes and more, without those of size 1."""
    return tuple(axis for axis in ("replica", "data", *more) if shape[axis] > 1)
