"""Peak memory of one device in a step, counted from the sizes of the model and the mesh.

What is held throughout (weights, optimizer, batch, gradients, what layers keep for the backward
pass) follows from the program. The working set beside it is a number of arrays of every kind, the
most that are alive at once. Those numbers were fitted to what XLA's CPU compiler reports for 75
float32 steps on 8 devices, of widths 128 to 512 (docs/plan.md says how well they fit). `uoe plan`
needs the count for 16 bits and flash attention, which the CPU compiler does not have, and for
meshes that are not compiled. Letters as in `layers.common`.
"""

import dataclasses
from typing import NamedTuple

from uoe_jax.config.schema import Config
from uoe_jax.costs.memory import ITEM_SIZE, kept_bytes
from uoe_jax.layers.tiles import chunk, tile
from uoe_jax.models.count import parameters_per_device, vocabulary_parameters
from uoe_jax.plan.predict import Shape, examples, rows, scored_here, vocabulary_shards


class Peak(NamedTuple):
    """Bytes of one device."""

    parameters: float
    optimizer: float
    batch: float
    gradients: float  # with those that microbatches are added to
    kept: float  # by all layers for the backward pass
    layer: float  # the working set of one layer's backward pass, with its gathered weights
    ends: float  # that outside the layers: the vocabulary's scores, or a classifier's inputs

    @property
    def arguments(self) -> float:
        return self.parameters + self.optimizer + self.batch

    @property
    def temporary(self) -> float:
        return self.gradients + self.kept + max(self.layer, self.ends)


def peak(c: Config, shape: Shape, flash: bool) -> Peak:
    """flash: attention holds no scores; else it holds float32 scores of one tile of every head."""
    m, e, b = c.model, shape["expert"], rows(c, shape)
    item, length, d, dh = ITEM_SIZE[m.dtype], m.block_length, m.d_model, m.head_dim
    stream = item * b * length * d
    tokens: dict[str, float] = {"smha": b * length, "uome": b * length}
    slots = {"smha": 0.0, "uome": 0.0}  # gathered for a device's experts, or their outputs
    for name, r in m.routed().items():
        tokens[name] = b * r.slot_tokens(length) * r.row_share()
        slots[name] = item * r.n_experts / e * tokens[name] * d if r.order == "gather" else 0.0
    heads = item * tokens["smha"] * dh * (2 * m.n_heads + 2 * m.kv_heads) / e
    hidden = item * tokens["uome"] * m.d_hidden / e
    square = length if m.attention == "dense" else m.smha.slot_tokens(length)
    scores = 0.0 if flash else 4 * tokens["smha"] / square * tile(square) ** 2 * m.n_heads / e
    # A loop over several tiles carries the sums of heads and of their gradients, float32.
    carried = 0.0 if flash or tile(square) == square else 2 * 4 / item * heads
    weight = (2 * item + 4) / e  # with its gradient in the compute dtype and in float32
    attention = weight * 2 * d * dh * (m.n_heads + m.kv_heads)
    attention += 2 * slots["smha"] + 4 * heads + carried + 4 * scores + 9 * stream
    mlp = weight * (m.n_into + 1) * d * m.d_hidden + 2.5 * slots["uome"] + 4 * hidden + 13 * stream
    held = parameters_per_device(m, shape)

    stored = dataclasses.replace(m, remat="slots") if m.remat in ("none", "dots") else m
    kept: float = kept_bytes(stored, examples(c, shape), e, e if c.mesh.sequence_parallel else 1)
    if m.remat in ("none", "dots"):  # results of products too; 'none': and what is made from them
        kept += sum(slots.values()) + (m.remat == "none") * (4 * stream + hidden)
    if m.remat == "none" and (shape["fsdp"] > 1 or item < 4):  # and weights gathered or cast
        kept += item * parameters_per_device(m, {**shape, "fsdp": 1}, "layers") / m.n_layers
    return Peak(
        parameters=4 * held,
        optimizer=2 * ITEM_SIZE[c.optimizer.moment_dtype] * held,
        batch=_batch(c, shape),
        gradients=4 * held * (1 + (c.train.accumulation > 1)),
        kept=m.n_layers * kept,
        layer=max(attention, mlp),
        ends=_ends(c, shape) + 5 * stream,
    )


def _batch(c: Config, shape: Shape) -> float:
    """Bytes of a device's rows of a step: four numbers a token; or those of input and mask."""
    m, n = c.model, examples(c, shape) * c.train.accumulation
    if m.task == "language":
        return 4 * n * (4 * m.context_length + 1)
    tokens = m.rows_per_example * m.context_length
    pixels = m.image.height * m.image.width * m.image.channels
    return n * ((pixels if m.stem == "image" else 4 * tokens) + 4 * tokens + 3 * 4)


def _ends(c: Config, shape: Shape) -> float:
    """Bytes of a chunk's scores and of the vocabulary's gradient, or of images becoming tokens."""
    m, e, item = c.model, shape["expert"], ITEM_SIZE[c.model.dtype]
    tokens = rows(c, shape) * m.context_length
    entries = vocabulary_parameters(m) / vocabulary_shards(m, e)
    if m.task == "classify":
        return tokens * m.image.values * (4 + item) if m.stem == "image" else 4 * entries
    # An adaptive softmax's is gathered as a layer's weights are.
    gradient = (2 * item + 4) * entries if m.cutoffs else 4 * entries
    pieces = scored_here(c, shape, tokens)
    scores = max(3 * 4 * chunk(int(own), int(width)) * width for own, width, _, _ in pieces)
    return scores + gradient
