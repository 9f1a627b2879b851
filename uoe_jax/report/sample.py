"""What is shown of the routing itself: a passage of text token by token, or pictures, and who took which patch of them."""

from __future__ import annotations

import codecs
import math
from typing import NamedTuple

import jax
import numpy as np

from uoe_jax.config.data import FACTS
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.augment import as_floats
from uoe_jax.data.pipeline import Rows
from uoe_jax.data.sources import listops
from uoe_jax.data.tokenizers.load import Tokenizer
from uoe_jax.distributed.mesh import by_partitioner, everywhere
from uoe_jax.errors import UserError
from uoe_jax.models.classifier import Classifier
from uoe_jax.train.step import Params, Program

TEXTS, PICTURES = 2, 6  # rows shown
CELLS = 400_000  # numbers shown of a block: patches, experts and layers of all rows
START = "▮"  # where a document begins


class Sample(NamedTuple):
    """Rows to look at, and what the model takes for them.

    Attributes:
      batch: arrays with a leading axis of rows.
      texts: for every row the text of every token shown, or None.
      pictures: for every row uint8 [height,width,channels], or None; `grid` tokens high and wide.
      before: tokens in front of the first one shown.
      titles: of the rows.
    """

    batch: dict[str, np.ndarray]
    texts: list[list[str]] | None
    pictures: list[np.ndarray] | None
    grid: tuple[int, int]
    before: int
    titles: list[str]


class RoutingSample(NamedTuple):
    """The routing of a sample at a checkpoint, or (sample None) why there is none."""

    sample: Sample | None
    routes: dict[str, np.ndarray]
    step: int
    why: str = ""


def of_rows(config: Config, rows: Rows, tokenizer: Tokenizer | None) -> Sample:
    """The first rows of a split."""
    m = config.model
    if m.task == "language":
        found = [rows[i] for i in range(min(TEXTS, len(rows)))]
        batch = {
            name: np.stack([row[name] for row in found])
            for name in ("tokens", "segments", "positions")
        }
        texts = [
            pieces(ids[valid > 0], tokenizer, m)
            for ids, valid in zip(batch["tokens"], batch["segments"])
        ]
        return Sample(
            batch,
            texts,
            None,
            (0, 0),
            0,
            [f"row {i} of the validation split" for i in range(len(found))],
        )
    pictured = m.stem == "image" or (
        FACTS[config.data.source].image is not None
        and math.isqrt(m.context_length) ** 2 == m.context_length
    )
    examples = [rows[i] for i in range(min(PICTURES if pictured else TEXTS, len(rows)))]
    batch = {name: np.stack([row[name] for row in examples]) for name in ("inputs", "segments")}
    before = m.block_length - m.context_length  # the learned token in front
    titles = [f"class {row['label']}" for row in examples for _ in range(m.classifier.n_inputs)]
    if m.stem == "image":
        return Sample(
            batch,
            None,
            list(batch["inputs"]),
            (m.image.height // m.image.patch, m.image.width // m.image.patch),
            before,
            titles,
        )
    inputs, segments = (
        batch[name].reshape(-1, m.context_length) for name in ("inputs", "segments")
    )
    if pictured:
        side = math.isqrt(m.context_length)
        return Sample(
            batch,
            None,
            list(inputs.reshape(-1, side, side, 1).astype(np.uint8)),
            (side, side),
            before,
            titles,
        )
    texts = [pieces(ids[valid > 0], tokenizer, m) for ids, valid in zip(inputs, segments)]
    return Sample(batch, texts, None, (0, 0), before, titles)


def of_text(config: Config, text: str, tokenizer: Tokenizer) -> Sample:
    """One passage of one's own, cut to the context.

    Raises:
      UserError: the model takes no text.
    """
    m = config.model
    if m.task != "language":
        raise UserError(
            f"--text: the model's task is {m.task!r}, and it reads rows of its data alone; leave the option out"
        )
    ids = np.append(tokenizer.start, tokenizer.encode(text))[: m.context_length].astype(np.int32)
    row = np.zeros(m.context_length, np.int32)
    batch = {"tokens": row.copy(), "segments": row.copy(), "positions": row.copy()}
    batch["tokens"][: len(ids)], batch["segments"][: len(ids)], batch["positions"][: len(ids)] = (
        ids,
        1,
        np.arange(len(ids)),
    )
    return Sample(
        {name: a[None] for name, a in batch.items()},
        [pieces(ids, tokenizer, m)],
        None,
        (0, 0),
        0,
        ["the text given"],
    )


def pieces(ids: np.ndarray, tokenizer: Tokenizer | None, m: ModelConfig) -> list[str]:
    """The text of every token. A character of several tokens is shown with the last of them."""
    if tokenizer is None:
        return [listops.to_text([i]) + " " for i in ids]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    marks = {tokenizer.start, tokenizer.separator} if m.task == "language" else set()
    return [
        START
        if int(i) in marks
        else decoder.decode(tokenizer.decode_bytes([i]) if i < tokenizer.vocab_size else b"")
        for i in ids
    ]


def routes(
    program: Program, params: Params, sample: Sample, config: Config
) -> dict[str, np.ndarray]:
    """By block the experts' combine weights, float32 [layers,rows,M,N], -1 where an expert did not take a patch.

    In every process the same; no more patches of a row than can be shown (`CELLS`), and none of padding.
    """

    @jax.jit
    def found(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        model = program.model(params)
        if isinstance(model, Classifier):
            inputs = batch["inputs"]
            if config.model.stem == "image":
                inputs = as_floats(inputs, config.model.image.bound)
            entered = model.embed_inputs(inputs, batch["segments"])
        else:
            entered = model.embed_inputs(batch["tokens"], batch["segments"], batch["positions"])
        return jax.tree.map(everywhere, model.routes(*entered))

    with by_partitioner():
        host = jax.device_get(found(params, sample.batch))
    out = {}
    for block, weights in host.items():
        layers, rows, _, n = weights.shape
        p = config.model.routed()[block].patch_size
        tokens = max(map(len, sample.texts)) if sample.texts else math.prod(sample.grid)
        out[block] = weights[
            :, :, : min(-(-(sample.before + tokens) // p), max(1, CELLS // (layers * rows * n)))
        ]
    return out
