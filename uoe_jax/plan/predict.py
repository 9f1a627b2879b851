"""Time of a step on named hardware: a roofline for every part, and what can overlap with what.

Letters as in `layers.common`. All figures are of one device and one optimizer step. Host time and
kernel launches are not counted, so small models are predicted too fast.
"""

import itertools
import math
from typing import Iterable, Mapping, NamedTuple

from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.costs import flops
from uoe_jax.costs.memory import ITEM_SIZE
from uoe_jax.layers.tiles import chunk
from uoe_jax.models import count
from uoe_jax.plan.hardware import Hardware, Range
from uoe_jax.plan.hlo import Array, Collective

Shape = Mapping[str, int]  # sizes of the mesh axes, in the mesh's order


class Reduction(NamedTuple):
    """A forward reduction over `expert` and the compute of its block: best-case seconds."""

    block: str
    reduction: float
    compute: float


class Prediction(NamedTuple):
    """Seconds are (best, worst)."""

    parts: dict[str, Range]  # `experts`, `weights`: collectives over `expert`, the batch axes
    step: Range  # best: collectives of the batch axes overlap with the rest; worst: nothing does
    mfu: Range  # (worst, best) model FLOP/s over the peak
    flops: float  # of the model, as training logs them
    executed: float  # with recomputation
    reductions: tuple[Reduction, ...]  # one for each kind of block; none without an `expert` axis


def examples(c: Config, shape: Shape) -> int:
    """Examples (a language model's rows) of one device's microbatch."""
    return c.train.batch_size // c.train.accumulation * shape["expert"] // math.prod(shape.values())


def rows(c: Config, shape: Shape) -> int:
    """Rows of one device's microbatch as the blocks see them: an example of two inputs is two."""
    return examples(c, shape) * c.model.rows_per_example


def vocabulary_shards(m: ModelConfig, expert: int) -> int:
    """Shards of the embeddings over `expert`; an adaptive softmax is never sharded there."""
    return 1 if m.cutoffs or m.vocab_size % expert else expert


def scoring_replicas(c: Config, expert: int) -> int:
    """Devices over `expert` that compute the same scores of the same tokens (or classes)."""
    m = c.model
    if m.task == "classify":
        return expert
    cut = m.context_length % expert == 0 if m.cutoffs else vocabulary_shards(m, expert) == expert
    return 1 if cut or c.mesh.sequence_parallel else expert


def scored_here(c: Config, shape: Shape, tokens: float) -> list[tuple[float, float, float, int]]:
    """What a device scores of `tokens`, for every piece of the vocabulary: (tokens, entries, share
    of the tokens that is scored, width)."""
    m, e = c.model, shape["expert"]
    if vocabulary_shards(m, e) > 1:  # its shard of the entries, for all tokens of its rows
        return [(tokens, m.vocab_size / e, 1, m.d_model)]
    own = tokens * scoring_replicas(c, e) / e
    return [(own, scores, share, width) for share, scores, width in flops.scored_pieces(m)]


def predict(c: Config, shape: Shape, hardware: Hardware, moved: Iterable[Collective]) -> Prediction:
    """moved: the collectives of the compiled step, or `expected_collectives`."""
    products, core = executed_flops(c, shape["expert"])
    n, peak = math.prod(shape.values()), hardware.flops
    moved = [m for m in moved if m.axes]
    experts = [m for m in moved if m.axes == ("expert",)]
    others = [m for m in moved if m.axes != ("expert",)]
    work = {
        "products": (products / n / peak, hardware.products),
        "attention": (core / n / peak, hardware.attention),
        "memory": (moved_bytes(c, shape) / hardware.bandwidth, hardware.streams),
    }
    parts = {name: (at / share[1], at / share[0]) for name, (at, share) in work.items()}
    parts["experts"] = network_seconds(experts, shape, hardware, c.model)
    best, worst = (sum(times) for times in zip(*parts.values()))
    parts["weights"] = weights = network_seconds(others, shape, hardware, c.model)
    step = max(best, weights[0]), worst + weights[1]
    model_flops = flops.train_flops(c.model, c.train.batch_size)
    mfu = model_flops / (n * peak * step[1]), model_flops / (n * peak * step[0])
    executed = products + core
    return Prediction(parts, step, mfu, model_flops, executed, reductions(c, shape, hardware))


def executed_flops(c: Config, expert: int) -> tuple[float, float]:
    """FLOPs of a step on all devices, with recomputation and what several devices compute alike:
    (matrix products, attention core).

    Flash attention's backward pass takes 2.5 times its forward pass, as it makes the scores again,
    and a remat policy that drops the forward's results one forward more. The backward pass of a
    vocabulary makes its scores again, too.
    """
    m, length = c.model, c.model.block_length
    core: float = m.n_layers * flops.core_flops(m, length, True)
    block = flops.attention_flops(m, length, True) + flops.mlp_flops(m, length, True)
    scores = flops.score_flops(m, length) if m.task == "language" else 0
    products = (3 + (m.remat == "block")) * m.rows_per_example * (m.n_layers * block - core)
    products += scoring_replicas(c, expert) * (3 * flops.ends_flops(m, length) + scores)
    core *= m.rows_per_example * (3.5 + (m.remat in ("slots", "block")))
    return c.train.batch_size * products, c.train.batch_size * core


def moved_bytes(c: Config, shape: Shape) -> float:
    """Bytes that one device's kernels move through its memory, without the activations of products.

    Slots are written and read by gathers and sums: once forward, twice backward, and their gather
    once more. The rest counts passes over arrays (norms, residuals, activations, losses, AdamW),
    each a read or write of one array.
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
        passes = 3 * (into + tokens * m.d_model) + 2 * (slots + tokens) * m.d_model
        total += m.n_layers * item * passes
    total += m.n_layers * item * at["uome"] * m.d_hidden / e * (4 * m.n_into + 3)
    total += _ends_moved(c, tokens, shape)
    total += c.train.accumulation * m.n_layers * count.layer_parameters(m) / e * (3 * item + 4)
    return (
        total
        + 4 * (4 + ITEM_SIZE[c.optimizer.moment_dtype]) * count.parameters(m) / e / shape["fsdp"]
    )


def _ends_moved(c: Config, tokens: float, shape: Shape) -> float:
    """Bytes moved for scores, or for images; `tokens` of a device in a step."""
    m = c.model
    if m.task == "classify":  # pixels: bytes in, float32 out and in, then tokens
        pixel_bytes = 1 + 2 * 4 + 3 * ITEM_SIZE[m.dtype]
        return tokens * m.image.values * pixel_bytes if m.stem == "image" else 0
    # Scores are made twice. Every chunk of tokens reads and writes the gradient of its entries.
    parts, total = c.train.accumulation, 0.0
    for own, scores, share, width in scored_here(c, shape, tokens / parts):
        chunks = math.ceil(own * share / chunk(int(own), int(scores)))
        total += parts * (8 * 4 * own * share * scores + 2 * 4 * chunks * scores * width)
    return total


def reductions(c: Config, shape: Shape, hardware: Hardware) -> tuple[Reduction, ...]:
    """The forward reductions over `expert` of one microbatch, beside the blocks they follow."""
    m, e, length = c.model, shape["expert"], c.model.block_length
    if e == 1:
        return ()
    stream = Array("f32", (rows(c, shape), length, m.d_model))
    moved = Collective("all-reduce", stream, stream, ("expert",), e, 1, True, "", "")
    seconds = network_seconds([moved], shape, hardware, m)[0]
    core = flops.core_flops(m, length, True)
    products = flops.attention_flops(m, length, True) - core
    attention = products / hardware.products[1] + core / hardware.attention[1]
    mlp = flops.mlp_flops(m, length, True) / hardware.products[1]
    name = f"{m.mlp} MLP" if m.mlp == m.attention else m.mlp
    return tuple(
        Reduction(block, seconds, rows(c, shape) * work / e / hardware.flops)
        for block, work in ((m.attention, attention), (name, mlp))
    )


def expected_collectives(c: Config, shape: Shape) -> list[Collective]:
    """The collectives that a step needs on a mesh, counted from sizes; small arrays are left out.
    For comparing meshes, as compiling each takes minutes; the planned mesh's own are compiled."""
    found: list[Collective] = []

    def add(kind: str, elements: float, axes: tuple[str, ...], runs: int) -> None:
        """elements: of the whole array. runs: in a microbatch."""
        axes = tuple(axis for axis in axes if shape[axis] > 1)
        group, times = math.prod(shape[a] for a in axes), runs * c.train.accumulation
        if axes and times:
            whole, part = (Array("f32", (round(n),)) for n in (elements, elements / group))
            before = part if kind == "all-gather" else whole
            after = part if kind == "reduce-scatter" else whole
            name = str(len(found))
            found.append(Collective(kind, before, after, axes, group, times, True, "", name))

    m, e, sequence_parallel = c.model, shape["expert"], c.mesh.sequence_parallel
    # Looked up, and (language) scored. A classifier's stem for images and its head are replicated.
    uses = (m.stem == "tokens") + (m.task == "language")
    shards = vocabulary_shards(m, e) if uses else 1
    stream, layer = rows(c, shape) * m.block_length * m.d_model, count.layer_parameters(m) / e
    again = m.remat in ("dots", "block")  # the state between attention and MLP is recomputed
    sums = m.n_layers * (4 + again) + uses * (shards > 1)
    if sequence_parallel:  # a sum is a scatter and, before the next block, a gather, also backward
        gathers = m.n_layers * (4 + 2 * (m.remat != "none")) + uses * (shards > 1)
        add("all-gather", stream, ("expert",), gathers)
        add("reduce-scatter", stream, ("expert",), sums)
    else:
        add("all-reduce", stream, ("expert",), sums)
    own = ("expert",) if sequence_parallel else ()  # gradients of a device's own tokens are summed
    read = own if shards == 1 else ()
    scored = ("expert",) if m.cutoffs and scoring_replicas(c, e) == 1 else read
    if scored and not sequence_parallel:
        add("all-gather", stream, ("expert",), 1)  # of the gradient
    entries, learned = count.vocabulary_parameters(m) / shards, m.position == "learned"
    for elements, gathers, gradients, over in (
        (layer, (1 if m.remat == "none" else 2) * m.n_layers, m.n_layers, ()),
        (entries, min(uses, 1) if m.tie_embeddings else uses, uses > 0, read),
        (entries, 0, m.task == "language", scored),
        (m.block_length * m.d_model, learned, learned, own),
    ):
        add("all-gather", elements, ("fsdp",), gathers)
        add("reduce-scatter", elements, ("fsdp",), gradients)
        add("all-reduce", elements / shape["fsdp"], ("replica", "data", *over), gradients)
    add("all-reduce", count.classifier_parameters(m), ("replica", "data", "fsdp"), 1)
    return found


def sent_bytes(moved: Collective, m: ModelConfig) -> float:
    """Bytes a device sends in a step for a collective of the float32 step, at the dtype of `m`.

    Activations over `expert` (also the gradient of an adaptive softmax that crosses it alone) and
    gathered weights are in the compute dtype, gradients and sums in float32.
    """
    narrow = moved.axes == ("expert",) or moved.kind == "all-gather"
    return moved.sent * moved.times * (ITEM_SIZE[m.dtype] / 4 if narrow else 1)


def network_seconds(moved: list[Collective], shape: Shape, hw: Hardware, m: ModelConfig) -> Range:
    """(best, worst) seconds of collectives one after the other; at best no hop costs time."""
    best = worst = 0.0
    latency = {}
    for c in moved:
        r = ring(c.axes, shape, hw)
        sent = sent_bytes(c, m) / r.bandwidth
        best, worst = best + sent / hw.network[1], worst + sent / hw.network[0]
        latency[c.name] = c.times * (r.tree if c.kind == "all-reduce" else r.once)
    return best, worst + sum(latency.values())


class Ring(NamedTuple):
    bandwidth: float  # bytes/s a device sends
    once: float  # seconds of an empty message around it
    tree: float  # and up and down a tree


def ring(axes: tuple[str, ...], shape: Shape, hardware: Hardware) -> Ring:
    """The ring over mesh axes, devices numbered with `expert` innermost. It leaves a fast domain
    once, over the slow links of all its members there; no domain spans `replica`."""
    domain = min(hardware.domain, math.prod(shape.values()) // shape["replica"])
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
