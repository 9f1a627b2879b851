"""Rows of a batch, by index: packed documents, or labelled examples. Row i is a function of i.

Letters: L row length, P patch size, D number of documents. A document of n tokens becomes the
inputs [START, t0 … t(n-1)] and the targets [t0 … t(n-1), SEP] (START is SEP with most tokenizers),
padded to a multiple of P. The padded documents are laid end to end in store order and cut every L
positions. P divides L, so no patch holds two documents, and a patch that is not all padding begins
with a valid token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config
from uoe_jax.data import augment
from uoe_jax.data.examples import Example, Examples
from uoe_jax.data.store import TokenStore
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.errors import UserError

Row = dict[str, np.ndarray | np.int32 | np.float32]
Batch = dict[str, np.ndarray]  # a row with a leading B


class PackedRows:
    """Random access to packed rows; each target of each document is in exactly one row.

    `rows[i]` is a dict of int32 arrays, with 0 at padding:
      tokens, targets [L]: inputs and what follows them.
      segments [L]: 1, 2, … for the pieces of documents in this row, in order.
      positions [L]: from 0 at the first token of the piece in this row.
      n_bytes []: bytes of text that the valid targets stand for; 0 where they are unknown.
    """

    needs_all_rows = False  # this and what no row of text needs: see LabelledRows

    def __init__(self, store: TokenStore, length: int, multiple: int, tokenizer: Tokenizer) -> None:
        """length, multiple: L and P; `config.validate` refuses an L that P does not divide."""
        self.length = length
        self._separator, self._start = tokenizer.separator, tokenizer.start
        self._bytes_V = tokenizer.bytes_per_token
        self._bytes_E = None if store.bytes_unknown else store.bytes_E
        # At least one element, so that a split of empty documents is no special case below.
        self._tokens_T = store.tokens_T if store.tokens_T.size else np.zeros(1, np.int64)
        self._offsets = store.offsets  # int64 [D + 1], into the tokens
        sizes_D = np.diff(store.offsets) + 1  # targets per document: its tokens and the separator
        padded_D = -(-sizes_D // multiple) * multiple
        self._starts = np.append(0, np.cumsum(padded_D))  # [D + 1], of documents laid end to end
        self.n_targets = int(sizes_D.sum())

    def __len__(self) -> int:
        return int(-(-self._starts[-1] // self.length))

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        lo, hi = i * self.length, (i + 1) * self.length
        # Padded documents are never empty, so the starts ascend strictly. These overlap the row:
        first = np.searchsorted(self._starts, lo, "right") - 1
        starts = self._starts[first : np.searchsorted(self._starts[:-1], hi, "left")]

        at_L = np.arange(lo, hi)
        piece_L = np.searchsorted(starts, at_L, "right")  # 1, 2, …
        doc_L = first + piece_L - 1
        within_L = at_L - starts[piece_L - 1]  # 0: the start token's input, n: the separator target
        begin_L = self._offsets[doc_L]
        n_L = self._offsets[doc_L + 1] - begin_L
        valid_L = within_L <= n_L  # false past the end of the last document as well

        next_L = begin_L + within_L
        inputs_L = self._tokens_T.take(next_L - 1, mode="clip")
        inputs_L = np.where(within_L == 0, self._start, inputs_L)
        targets_L = self._tokens_T.take(next_L, mode="clip")
        targets_L = np.where(within_L == n_L, self._separator, targets_L) * valid_L
        if self._bytes_V is not None:
            bytes_L = self._bytes_V[targets_L]
        elif self._bytes_E is not None:
            bytes_L = self._bytes_E.take(next_L + doc_L, mode="clip")
        else:
            bytes_L = np.zeros(self.length, np.int32)
        arrays = {"tokens": inputs_L, "targets": targets_L, "segments": piece_L}
        arrays["positions"] = at_L - np.maximum(starts, lo)[piece_L - 1]
        row: Row = {name: (a * valid_L).astype(np.int32) for name, a in arrays.items()}
        return row | {"n_bytes": np.sum(bytes_L, where=valid_L, dtype=np.int32)}

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        return self[i]

    def trimmed(self, batch: Batch) -> Batch:
        return batch


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRows:
    """One split, by index. `rows[i]` is a dict of arrays:

    inputs: int32 [L] ids, 0 at padding ([2,L] of pairs); images uint8 [height,width,channels].
    segments: int32 [L] ([2,L] of pairs), 1 at tokens, 0 at padding; of images [tokens].
    label, other: int32 [], classes; -1 in a row of padding.
    share: float32 [], the weight of `label` in the target; `other` has the rest (mixed images).
    """

    examples: Examples
    n_classes: int
    split: str  # its name, for errors
    config: Config
    tokenizer: Tokenizer | None  # of text

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Row:
        if self.config.model.stem == "image":
            image, label = self._image(augment.fitted, i)
            return self._image_row(image, label, label)
        return self._token_row(self._read(i))

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i as `seeds` draw it: an image is augmented and may be mixed with example `other`."""
        if self.config.model.stem != "image":
            return self[i]
        c, size, rng = self.config.augment, self.config.model.image, np.random.default_rng(seeds)
        draw = functools.partial(augment.augmented, c=c, rng=rng)
        image, label = self._image(draw, i)
        mix = augment.mixing(c, rng, size.height, size.width)
        if mix is None:
            return self._image_row(image, label, label)
        second, other_label = self._image(draw, other)
        return self._image_row(augment.mixed(image, second, mix), label, other_label, mix.share)

    @property
    def needs_all_rows(self) -> bool:
        """Whether the shape of a batch depends on the rows of other processes (data.buckets)."""
        return self.config.model.stem == "tokens" and self.config.data.buckets > 1

    def trimmed(self, batch: Batch) -> Batch:
        """A global batch cut to the bucket of its longest row."""
        context = self.config.model.context_length
        step = -(-context // self.config.data.buckets)
        longest = max(int(batch["segments"].sum(axis=-1).max()), 1)
        length = min(-(-longest // step) * step, context)
        return batch | {name: batch[name][..., :length] for name in ("inputs", "segments")}

    def _read(self, i: int) -> Example:
        example = self.examples[i]
        found = f"example {i} of the {self.split} split has"
        if not 0 <= example.label < self.n_classes:
            wrong = f"{found} label {example.label} where classes go from 0 to {self.n_classes - 1}"
            raise UserError(f"config.data.path: {wrong}; fix it there, or leave the example out")
        n_inputs = self.config.model.classifier.n_inputs
        if len(example.inputs) != n_inputs:
            key = f"config.model.classifier.n_inputs={n_inputs}"
            raise UserError(f"{key}: {found} {len(example.inputs)}; give that")
        return example

    def _image(self, make: Callable[..., np.ndarray], i: int) -> tuple[np.ndarray, int]:
        """(image of example i at the size the model takes, its label)."""
        example, size = self._read(i), self.config.model.image
        facts = SOURCES[self.config.data.source].facts
        resize = facts is not None and facts.resize
        try:
            image = make(example.inputs[0], height=size.height, width=size.width, resize=resize)
            if image.shape[-1] != size.channels:
                key = f"config.model.image.channels={size.channels}"
                raise ValueError(f"it has {image.shape[-1]} channels where {key}")
        except ValueError as error:
            what = f"example {i} of the {self.split} split cannot be used: {error}"
            raise UserError(f"config.data.path: {what}") from error
        return image, example.label

    def _image_row(self, image: np.ndarray, label: int, other: int, share: float = 1) -> Row:
        return _row(image, np.ones(self.config.model.context_length, np.int32), label, other, share)

    def _token_row(self, example: Example) -> Row:
        length = self.config.model.context_length
        inputs_IL = np.zeros((len(example.inputs), length), np.int32)
        segments_IL = np.zeros_like(inputs_IL)
        for ids_L, segments_L, given in zip(inputs_IL, segments_IL, example.inputs):
            if isinstance(given, bytes):
                assert self.tokenizer is not None  # `pipeline.load` gives text its tokenizer
                given = self.tokenizer.encode(given)
            elif given.ndim == 3:
                given = augment.grey_tokens(given)
                if len(given) != length:
                    found = f"an image of the {self.split} split has {len(given)} pixels; give that"
                    raise UserError(f"config.model.context_length={length}: {found}")
            n = min(len(given), length)
            ids_L[:n], segments_L[:n] = given[:n], 1
        if len(inputs_IL) == 1:
            inputs_IL, segments_IL = inputs_IL[0], segments_IL[0]
        return _row(inputs_IL, segments_IL, example.label, example.label)


def _row(inputs: np.ndarray, segments: np.ndarray, label: int, other: int, share: float = 1) -> Row:
    target: Row = {"label": np.int32(label), "other": np.int32(other), "share": np.float32(share)}
    return {"inputs": inputs, "segments": segments, **target}
