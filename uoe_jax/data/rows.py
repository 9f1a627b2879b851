"""Labelled examples as rows of a batch: token ids padded to the context, or images, and a class."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config
from uoe_jax.data import augment
from uoe_jax.data.examples import Example, Examples
from uoe_jax.data.packing import Batch, Row
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.errors import UserError


class LabelledRows:
    """One split, by index. `rows[i]` is a dict of arrays:

    inputs: int32 [L] ids, 0 at padding ([2,L] of pairs); images uint8 [height,width,channels].
    segments: int32 [L] ([2,L] of pairs), 1 at tokens, 0 at padding; of images [tokens].
    label, other: int32 [], classes; -1 in a row of padding.
    share: float32 [], the weight of `label` in the target; `other` has the rest (mixed images).
    """

    def __init__(
        self,
        examples: Examples,
        n_classes: int,
        name: str,
        config: Config,
        tokenizer: Tokenizer | None,
    ) -> None:
        """name: of the split, for errors. tokenizer: of text."""
        self._examples, self._n_classes, self._name = examples, n_classes, name
        self._model, self._augment, self._tokenizer = config.model, config.augment, tokenizer
        facts, length = SOURCES[config.data.source].facts, config.model.context_length
        self._resize = facts is not None and facts.resize
        self._size = (config.model.image.height, config.model.image.width)
        self._step = -(-length // config.data.buckets)
        self._ones_L = np.ones(length, np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Row:
        if self._model.stem == "image":
            return _row(*self._image(augment.fitted, i), self._ones_L)
        return self._token_row(self._read(i))

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i as `seeds` draw it: an image is augmented and may be mixed with example `other`."""
        if self._model.stem != "image":
            return self[i]
        c, rng = self._augment, np.random.default_rng(seeds)
        draw = functools.partial(augment.augmented, c=c, rng=rng)
        image, label = self._image(draw, i)
        mix = augment.mixing(c, rng, *self._size)
        if mix is None:
            return _row(image, label, self._ones_L)
        second, other_label = self._image(draw, other)
        mixed = augment.mixed(image, second, mix)
        return _row(mixed, label, self._ones_L) | _target(label, other_label, mix.share)

    def n_tokens(self, i: int) -> int:
        """The valid tokens of row i; of a pair, of the longer input."""
        return int(np.sum(self[i]["segments"], axis=-1).max())

    @property
    def needs_all_rows(self) -> bool:
        """Whether the shape of a batch depends on the rows of other processes (data.buckets)."""
        return self._model.stem == "tokens" and self._step < self._model.context_length

    def trimmed(self, batch: Batch) -> Batch:
        """A global batch cut to the bucket of its longest row."""
        longest = max(int(batch["segments"].sum(axis=-1).max()), 1)
        length = min(-(-longest // self._step) * self._step, self._model.context_length)
        return batch | {name: batch[name][..., :length] for name in ("inputs", "segments")}

    def _read(self, i: int) -> Example:
        example = self._examples[i]
        found = f"example {i} of the {self._name} split has"
        if not 0 <= example.label < self._n_classes:
            raise UserError(
                f"config.data.path: {found} label {example.label}, and there are only the classes "
                f"0 to {self._n_classes - 1}; fix it there, or leave the example out"
            )
        n_inputs = self._model.classifier.n_inputs
        if len(example.inputs) != n_inputs:
            key = f"config.model.classifier.n_inputs={n_inputs}"
            raise UserError(f"{key}: {found} {len(example.inputs)}; give that")
        return example

    def _image(self, make: Callable[..., np.ndarray], i: int) -> tuple[np.ndarray, int]:
        """(image of example i at the size the model takes, its label)."""
        example, channels = self._read(i), self._model.image.channels
        height, width = self._size
        try:
            image = make(example.inputs[0], height=height, width=width, resize=self._resize)
            if image.shape[-1] != channels:
                key = f"config.model.image.channels={channels}"
                raise ValueError(f"it has {image.shape[-1]} channels where {key}")
        except ValueError as error:
            what = f"example {i} of the {self._name} split cannot be used: {error}"
            raise UserError(f"config.data.path: {what}") from error
        return image, example.label

    def _token_row(self, example: Example) -> Row:
        length = self._model.context_length
        inputs_IL = np.zeros((len(example.inputs), length), np.int32)
        segments_IL = np.zeros_like(inputs_IL)
        for ids_L, segments_L, given in zip(inputs_IL, segments_IL, example.inputs):
            if isinstance(given, bytes):
                assert self._tokenizer is not None  # `pipeline.load` gives text its tokenizer
                given = self._tokenizer.encode(given)
            elif given.ndim == 3:
                given = augment.grey_tokens(given)
                if len(given) != length:
                    found = f"an image of the {self._name} split has {len(given)} pixels; give that"
                    raise UserError(f"config.model.context_length={length}: {found}")
            n = min(len(given), length)
            ids_L[:n], segments_L[:n] = given[:n], 1
        if len(inputs_IL) == 1:
            inputs_IL, segments_IL = inputs_IL[0], segments_IL[0]
        return _row(inputs_IL, example.label, segments_IL)


def _row(inputs: np.ndarray, label: int, segments: np.ndarray) -> Row:
    return {"inputs": inputs, "segments": segments, **_target(label, label, 1)}


def _target(label: int, other: int, share: float) -> Row:
    return {"label": np.int32(label), "other": np.int32(other), "share": np.float32(share)}
