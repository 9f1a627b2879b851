"""The rows whose routing a report shows, and which experts took which of their patches."""

import codecs
import math
from typing import NamedTuple

import jax
import numpy as np

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.augment import as_floats
from uoe_jax.data.pipeline import Rows
from uoe_jax.data.sources import listops
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.distributed.mesh import by_partitioner, everywhere
from uoe_jax.errors import UserError
from uoe_jax.train.step import Params, Program

TEXTS, PICTURES = 2, 6  # rows shown
CELLS = 400_000  # weights shown of a block: patches x experts x layers of all rows
START = "▮"  # where a document begins


class Sample(NamedTuple):
    """Rows to show, as texts or as pictures."""

    batch: dict[str, np.ndarray]  # the model's inputs, with a leading axis of rows
    texts: list[list[str]] | None  # of every row the text of every token shown
    pictures: list[np.ndarray] | None  # of every row uint8 [height,width,channels]
    grid: tuple[int, int]  # tokens of a picture, high and wide
    before: int  # tokens in front of the first one shown
    titles: list[str]  # of the rows


class RoutingSample(NamedTuple):
    """The routing of a sample at a checkpoint (`routes`), or (sample None) why there is none."""

    sample: Sample | None
    routes: dict[str, np.ndarray]
    step: int
    why: str = ""


def of_rows(config: Config, rows: Rows, tokenizer: Tokenizer | None) -> Sample:
    """The first rows of a split."""
    m, facts = config.model, SOURCES[config.data.source].facts
    is_image, side = m.stem == "image", math.isqrt(m.context_length)
    in_pixels = facts is not None and facts.image is not None and side**2 == m.context_length
    found = [rows[i] for i in range(min(PICTURES if is_image or in_pixels else TEXTS, len(rows)))]
    if m.task == "language":
        names = ["tokens", "segments", "positions"]
        titles = [f"row {i} of the validation split" for i in range(len(found))]
    else:
        names = ["inputs", "segments"]
        titles = [f"class {row['label']}" for row in found for _ in range(m.classifier.n_inputs)]
    batch = {name: np.stack([row[name] for row in found]) for name in names}
    before = m.block_length - m.context_length  # the learned token in front
    if is_image:
        grid = m.image.height // m.image.patch, m.image.width // m.image.patch
        return Sample(batch, None, list(batch["inputs"]), grid, before, titles)
    inputs, segments = (batch[name].reshape(-1, m.context_length) for name in names[:2])
    if in_pixels:
        pictures = list(inputs.reshape(-1, side, side, 1).astype(np.uint8))
        return Sample(batch, None, pictures, (side, side), before, titles)
    texts = [pieces(ids[valid > 0], tokenizer, m) for ids, valid in zip(inputs, segments)]
    return Sample(batch, texts, None, (0, 0), before, titles)


def of_text(config: Config, text: str, tokenizer: Tokenizer) -> Sample:
    """A text of the user's, cut to the context. Raises UserError where the model takes no text."""
    m = config.model
    if m.task != "language":
        why = f"the model's task is {m.task!r}, and it reads rows of its data alone"
        raise UserError(f"--text: {why}; leave the option out")
    ids = np.append(tokenizer.start, tokenizer.encode(text))[: m.context_length].astype(np.int32)
    tokens, segments, positions = np.zeros((3, 1, m.context_length), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    positions[0, : len(ids)] = np.arange(len(ids))
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    return Sample(batch, [pieces(ids, tokenizer, m)], None, (0, 0), 0, ["the text given"])


def pieces(ids: np.ndarray, tokenizer: Tokenizer | None, m: ModelConfig) -> list[str]:
    """The text of every token. A character of several tokens is shown with the last of them."""
    if tokenizer is None:
        return [listops.to_text([i]) + " " for i in ids]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    marks = {tokenizer.start, tokenizer.separator} if m.task == "language" else set()

    def text(i: int) -> str:
        if i in marks:
            return START
        return decoder.decode(tokenizer.decode_bytes([i]) if i < tokenizer.vocab_size else b"")

    return [text(int(i)) for i in ids]


def routes(program: Program, params: Params, sample: Sample, c: Config) -> dict[str, np.ndarray]:
    """Combine weights by block, float32 [layers,rows,M,N]; -1 where an expert did not take a patch.

    The same in every process. Patches of padding, and what exceeds `CELLS`, are left out.
    """

    @jax.jit
    def found(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        model = program.model(params)
        inputs = [batch[name] for name in sample.batch]  # jax sorts the keys of `batch`
        if c.model.stem == "image":
            inputs[0] = as_floats(inputs[0], c.model.image.bound)
        return jax.tree.map(everywhere, model.routes(*model.embed_inputs(*inputs)))

    with by_partitioner():
        host = jax.device_get(found(params, sample.batch))
    shown = max(map(len, sample.texts)) if sample.texts else math.prod(sample.grid)
    for block, weights in host.items():
        layers, rows, _, n = weights.shape
        patches = math.ceil((sample.before + shown) / c.model.routed()[block].patch_size)
        host[block] = weights[:, :, : min(patches, max(1, CELLS // (layers * rows * n)))]
    return host
