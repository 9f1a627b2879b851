"""Time of a step on named hardware: a roofline for every part, and what can hide behind what.

Letters as in `layers.common`. All figures are of one device and one optimizer step. The time of the host and of
starting kernels is not counted, so that small models are predicted too fast.
"""

from __future__ import annotations

import itertools
import math
from typing import Iterable, Mapping, NamedTuple

from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.costs.flops import (
    attention_flops,
    core_flops,
    ends_flops,
    mlp_flops,
    score_flops,
    scored_pieces,
    train_flops,
)
from uoe_jax.costs.memory import ITEM_SIZE
from uoe_jax.layers.tiles import chunk
from uoe_jax.models.count import (
    classifier_parameters,
    layer_parameters,
    parameters,
    vocabulary_parameters,
)
from uoe_jax.plan.hardware import Hardware, Range
from uoe_jax.plan.hlo import Array, Collective

Shape = Mapping[str, int]  # sizes of the mesh axes, in the mesh's order


class Reduction(NamedTuple):
    """One forward reduction over `expert` beside the work of the block it follows, both at their best, in seconds."""

    block: str
    reduction: float
    compute: float


class Prediction(NamedTuple):
    """Seconds are (best, worst).

    Attributes:
      parts: by what is done; `experts` and `weights` are collectives over `expert` and over the batch axes.
      step: best, where the collectives of the batch axes hide behind everything else; worst, where nothing hides.
      mfu: (worst, best) model FLOP/s, as training logs them, of the peak.
      flops: of the model, as training logs them. executed: matrix products and attention that are really done.
      reductions: one for each kind of block; empty without an `expert` axis.
    """

    parts: dict[str, Range]
    step: Range
    mfu: Range
    flops: float
    executed: float
    reductions: tuple[Reduction, ...]


def devices(shape: Shape) -> int:
    return math.prod(shape.values())


def examples(c: Config, shape: Shape) -> int:
    """Examples (a language model's rows) of one device's microbatch."""
    return c.train.batch_size // c.train.accumulation * shape["expert"] // devices(shape)


def rows(c: Config, shape: Shape) -> int:
    """Rows of one device's microbatch as the blocks see them: an example of two inputs is two."""
    return examples(c, shape) * c.model.rows_per_example


def words_parts(m: ModelConfig, expert: int) -> int:
    """Into how many parts over `expert` the vectors of the words are cut; those of an adaptive softmax never are."""
    return 1 if m.cutoffs or m.vocab_size % expert else expert


def scored_alike(c: Config, expert: int) -> int:
    """How many devices over `expert` score the same words of the same tokens, or compute the same classes."""
    m = c.model
    if m.task == "classify":
        return expert
    cut = m.context_length % expert == 0 if m.cutoffs else words_parts(m, expert) == expert
    return 1 if cut or c.mesh.sequence_parallel else expert


def scored_here(c: Config, shape: Shape, tokens: float) -> list[tuple[float, float, float, int]]:
    """(tokens of `tokens`, words, share of the tokens, width) that a device scores, for every piece of the vocabulary."""
    m, e = c.model, shape["expert"]
    if words_parts(m, e) > 1:  # its words for all tokens of its rows
        return [(tokens, m.vocab_size / e, 1, m.d_model)]
    own = tokens * scored_alike(c, e) / e
    return [(own, scores, share, width) for share, scores, width in scored_pieces(m)]


def predict(c: Config, shape: Shape, hardware: Hardware, moved: Iterable[Collective]) -> Prediction:
    """From the sizes of the model and the collectives of its compiled step (or `expected_collectives`)."""
    products, core = executed_flops(c, shape["expert"])
    n, peak = devices(shape), hardware.flops
    moved = [m for m in moved if m.axes]
    experts, weights = (
        [m for m in moved if (m.axes == ("expert",)) is over] for over in (True, False)
    )
    parts = {
        "products": _over(products / n / peak, hardware.products),
        "attention": _over(core / n / peak, hardware.attention),
        "memory": _over(moved_bytes(c, shape) / hardware.bandwidth, hardware.streams),
        "experts": network_seconds(experts, shape, hardware, c.model),
        "weights": network_seconds(weights, shape, hardware, c.model),
    }
    best, worst = (
        sum(times)
        for times in zip(*(seconds for name, seconds in parts.items() if name != "weights"))
    )
    step = max(best, parts["weights"][0]), worst + parts["weights"][1]
    flops = train_flops(c.model, c.train.batch_size)
    mfu = tuple(flops / (n * peak * seconds) for seconds in reversed(step))
    return Prediction(parts, step, mfu, flops, products + core, reductions(c, shape, hardware))


def _over(seconds: float, reached: Range) -> Range:
    return seconds / reached[1], seconds / reached[0]


def executed_flops(c: Config, expert: int) -> tuple[float, float]:
    """(matrix products, attention core) of a step on all devices, what is recomputed and what several devices do alike
    included.

    The core is flash attention's: two and a half times the forward pass backward (it makes the scores again), and once
    more forward where a remat policy dropped what its backward pass needs. The backward pass of a vocabulary makes its
    scores again, too.
    """
    m, length = c.model, c.model.block_length
    core: float = m.n_layers * core_flops(m, length, training=True)
    blocks = (
        m.n_layers
        * (attention_flops(m, length, training=True) + mlp_flops(m, length, training=True))
        - core
    )
    again = m.remat in ("slots", "block")
    ends = 3 * ends_flops(m, length) + (score_flops(m, length) if m.task == "language" else 0)
    products = (3 + (m.remat == "block")) * m.rows_per_example * blocks + scored_alike(
        c, expert
    ) * ends
    core *= m.rows_per_example * (3.5 + again)
    return c.train.batch_size * products, c.train.batch_size * core


def moved_bytes(c: Config, shape: Shape) -> float:
    """Bytes that kernels other than matrix products move through a device's memory, and the weights that those read.

    Slots are written and read by gathers and sums: once forward, twice backward, and their gather once more. The rest is a
    count of passes over arrays (norms, residuals, activations, losses, AdamW), each read or write of one array a pass.
    """
    m, e = c.model, shape["expert"]
    item, tokens = ITEM_SIZE[m.dtype], rows(c, shape) * c.train.accumulation * m.block_length
    widths = {"smha": m.head_dim * (m.n_heads + 2 * m.kv_heads), "uome": m.n_into * m.d_hidden}
    total: float = m.n_layers * 2 * 15 * item * tokens * m.d_model
    at: dict[str, float] = {"smha": tokens, "uome": tokens}
    for name, r in m.routed().items():
        at[name] = tokens * r.slot_tokens(m.block_length) / m.block_length * r.row_share()
        slots = r.n_experts / e * at[name]
        into = slots * m.d_model if r.order == "gather" else slots * widths[name] / r.n_experts
        total += (
            m.n_layers * item * (3 * (into + tokens * m.d_model) + 2 * (slots + tokens) * m.d_model)
        )
    total += m.n_layers * item * at["uome"] * m.d_hidden / e * (4 * m.n_into + 3)
    total += _ends_moved(c, tokens, shape)
    total += c.train.accumulation * m.n_layers * layer_parameters(m) / e * (3 * item + 4)
    return total + 4 * (4 + ITEM_SIZE[c.optimizer.moment_dtype]) * parameters(m) / e / shape["fsdp"]


def _ends_moved(c: Config, tokens: float, shape: Shape) -> float:
    """Bytes moved for scores, or for images: `tokens` of a device in a step."""
    m = c.model
    if (
        m.task == "classify"
    ):  # pixels come as bytes, are written and read as float32 and then as tokens
        return (
            tokens * m.image.values * (1 + 2 * 4 + 3 * ITEM_SIZE[m.dtype])
            if m.stem == "image"
            else 0
        )
    # Scores are made twice, and every chunk of tokens reads and writes the gradient of the words it is scored against.
    parts, total = c.train.accumulation, 0.0
    for own, scores, share, width in scored_here(c, shape, tokens / parts):
        chunks = math.ceil(own * share / chunk(int(own), int(scores)))
        total += parts * (8 * 4 * own * share * scores + 2 * 4 * chunks * scores * width)
    return total


def narrowed(moved: Collective, m: ModelConfig) -> float:
    """Bytes a device sends in a step in all runs of a collective of the float32 step, at the dtype an accelerator has there.

    Over `expert` there are activations and over `fsdp` gathered weights, both in the compute dtype; gradients and sums are
    float32. (The words' gradient of an adaptive softmax is taken for activations where it crosses `expert` alone.)
    """
    narrow = moved.axes == ("expert",) or moved.kind == "all-gather"
    return moved.sent * moved.times * (ITEM_SIZE[m.dtype] / 4 if narrow else 1)


def network_seconds(
    moved: Iterable[Collective], shape: Shape, hardware: Hardware, m: ModelConfig
) -> Range:
    """(best, worst) seconds of collectives one after the other; at best all hops are hidden, or shared by combined ones."""
    best = worst = 0.0
    latency = {}
    for c in moved:
        r = ring(c.axes, shape, hardware)
        sent = narrowed(c, m) / r.bandwidth
        best, worst = best + sent / hardware.network[1], worst + sent / hardware.network[0]
        latency[c.name] = c.times * (r.tree if c.kind == "all-reduce" else r.once)
    return best, worst + sum(latency.values())


class Ring(NamedTuple):
    """bandwidth: bytes/s a device sends. Seconds of an empty message: once around; up and down a tree instead."""

    bandwidth: float
    once: float
    tree: float


def ring(axes: tuple[str, ...], shape: Shape, hardware: Hardware) -> Ring:
    """Over mesh axes; devices are numbered with `expert` innermost.

    A ring that leaves a fast domain goes out of it once, over the slow links of all its members there.
    """
    domain = min(
        hardware.domain, devices(shape) // shape["replica"]
    )  # what replica is for: the slow network between
    members = [sum(place) for place in itertools.product(*(_offsets(axis, shape) for axis in axes))]
    local = sum(member < domain for member in members)
    domains = math.ceil(len(members) / local)
    fast, slow = hardware.hops
    return Ring(
        bandwidth=hardware.fast if domains == 1 else min(hardware.fast, hardware.slow * local),
        once=(len(members) - domains) * fast + (domains > 1) * domains * slow,
        tree=2 * (math.log2(local) * fast + math.log2(domains) * slow),
    )


def _offsets(axis: str, shape: Shape) -> range:
    names = list(shape)
    stride = math.prod(shape[a] for a in names[names.index(axis) + 1 :])
    return range(0, stride * shape[axis], stride)


def reductions(c: Config, shape: Shape, hardware: Hardware) -> tuple[Reduction, ...]:
    """What one microbatch's forward reductions over `expert` take, beside the blocks they follow."""
    m, e, length = c.model, shape["expert"], c.model.block_length
    if e == 1:
        return ()
    b = rows(c, shape)
    sent = 2 * (e - 1) / e * ITEM_SIZE[m.dtype] * b * length * m.d_model
    seconds = sent / ring(("expert",), shape, hardware).bandwidth / hardware.network[1]
    core = core_flops(m, length, training=True)
    flash = core / hardware.attention[1]
    blocks = {
        m.attention: (attention_flops(m, length, training=True) - core) / hardware.products[1]
        + flash,
        f"{m.mlp} MLP" if m.mlp == m.attention else m.mlp: mlp_flops(m, length, training=True)
        / hardware.products[1],
    }
    return tuple(
        Reduction(name, seconds, b * flops / e / hardware.flops) for name, flops in blocks.items()
    )


def expected_collectives(c: Config, shape: Shape) -> list[Collective]:
    """What a step must move, counted from the sizes alone, for meshes that are not compiled; small arrays are left out."""
    m, e, fsdp, parts = c.model, shape["expert"], shape["fsdp"], c.train.accumulation
    batch = tuple(a for a in ("replica", "data") if shape[a] > 1)
    out: list[Collective] = []

    def add(kind: str, elements: float, axes: tuple[str, ...], times: int) -> None:
        group = math.prod(shape[a] for a in axes)
        if group > 1 and times:
            whole, part = Array("f32", (round(elements),)), Array("f32", (round(elements / group),))
            before, after = {"all-gather": (part, whole), "reduce-scatter": (whole, part)}.get(
                kind, (whole, whole)
            )
            out.append(
                Collective(kind, before, after, axes, group, times * parts, True, "", f"{len(out)}")
            )

    # Looked up, and (language) scored. What images are projected by, and a classifier's head, is whole on every device.
    uses = (m.stem == "tokens") + (m.task == "language")
    cut = words_parts(m, e) if uses else 1
    again = m.remat in ("dots", "block")  # the state between attention and MLP is made again
    stream, layer = rows(c, shape) * m.block_length * m.d_model, layer_parameters(m) / e
    reductions_of_stream = m.n_layers * (4 + again) + uses * (cut > 1)
    if (
        c.mesh.sequence_parallel
    ):  # a reduction is a scatter after the block and a gather before the next, made again backward
        add(
            "all-gather",
            stream,
            ("expert",),
            m.n_layers * (4 + 2 * (m.remat != "none")) + uses * (cut > 1),
        )
        add("reduce-scatter", stream, ("expert",), reductions_of_stream)
    else:
        add("all-reduce", stream, ("expert",), reductions_of_stream)
    # (values of a weight, gathers forward and backward, gradients, axes that these are added over beside those of the batch)
    words, own = (
        vocabulary_parameters(m) / cut,
        ("expert",) if c.mesh.sequence_parallel else (),
    )  # of a device's own tokens
    read = own if cut == 1 else ()
    scored = ("expert",) if m.cutoffs and scored_alike(c, e) == 1 else read
    if scored and not c.mesh.sequence_parallel:
        add("all-gather", stream, ("expert",), 1)  # of the gradient
    for elements, gathers, times, over in (
        (layer, (1 if m.remat == "none" else 2) * m.n_layers, m.n_layers, ()),
        (
            words,
            uses > 0 if m.tie_embeddings else uses,
            uses > 0,
            read,
        ),  # one gather for a table that is used twice
        (words, 0, m.task == "language", scored),
        (m.block_length * m.d_model, m.position == "learned", m.position == "learned", own),
    ):
        add("all-gather", elements, ("fsdp",), gathers)
        add("reduce-scatter", elements, ("fsdp",), times)
        add("all-reduce", elements / fsdp, tuple(a for a in (*batch, *over) if shape[a] > 1), times)
    add(
        "all-reduce",
        classifier_parameters(m),
        tuple(a for a in (*batch, "fsdp") if shape[a] > 1),
        1,
    )
    return out
