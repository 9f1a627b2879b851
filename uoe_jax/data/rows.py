"""Labelled examples as rows of a batch: token ids padded to the context, or images, with their class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from uoe_jax.config.data import FACTS
from uoe_jax.config.schema import Config
from uoe_jax.data import augment
from uoe_jax.data.examples import Example, Examples, Input
from uoe_jax.data.packing import Batch, Row
from uoe_jax.data.tokenizers.load import Tokenizer
from uoe_jax.errors import UserError


class LabelledRows:
    """One split, by index.

    `rows[i]`, as evaluation sees it, is a dict of arrays:

    - inputs: int32 [L] token ids, 0 where padding, or an image uint8 [height,width,channels]; of pairs [2,L].
    - segments: int32 [L] (of pairs [2,L]), 1 at tokens and 0 at padding; of images [tokens].
    - label, other: int32 [], classes; -1 in a row of padding. share: float32 [], what of the target is `label`, the rest
      being `other` (mixed images).
    """

    def __init__(
        self,
        examples: Examples,
        n_classes: int,
        name: str,
        config: Config,
        tokenizer: Tokenizer | None,
    ) -> None:
        """name: of the split, for errors. tokenizer: of text; other inputs have their token ids."""
        self._examples, self._n_classes, self._name = examples, n_classes, name
        self._model, self._augment, self._tokenizer = config.model, config.augment, tokenizer
        self._resize = FACTS[config.data.source].resize
        self._size = (config.model.image.height, config.model.image.width)
        self._step = -(-config.model.context_length // config.data.buckets)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Row:
        example = self._read(i)
        if self._model.stem == "image":
            image = self._image(augment.fitted, i, example, *self._size)
            return self._image_row(image, example.label, example.label, 1.0)
        return self._token_row(example)

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i as training sees it: images by the draws of `seeds`, perhaps mixed with example `other`."""
        if self._model.stem != "image":
            return self[i]
        c, rng = self._augment, np.random.default_rng(seeds)
        example = self._read(i)
        image, label, share = (
            self._image(augment.augmented, i, example, c, rng, *self._size),
            example.label,
            1.0,
        )
        mix = augment.mixing(c, rng, *self._size)
        if mix is not None:
            example, share = self._read(other), mix.share
            image = augment.mixed(
                image, self._image(augment.augmented, other, example, c, rng, *self._size), mix
            )
        return self._image_row(image, label, example.label, share)

    def n_tokens(self, i: int) -> int:
        """The valid tokens of row i; of a pair, of the longer input."""
        return int(np.sum(self[i]["segments"], axis=-1).max())

    def padding_row(self) -> Row:
        """A row that holds nothing and counts for nothing."""
        return self._padding

    @functools.cached_property
    def _padding(self) -> Row:
        zeros = {name: np.zeros_like(a) for name, a in self[0].items()}
        return {**zeros, "label": np.int32(-1), "other": np.int32(-1)}

    def trimmed(self, batch: Batch) -> Batch:
        """A global batch without the padding that no row of it needs, but for whole buckets (data.buckets)."""
        if not self.needs_all_rows:
            return batch
        longest = max(int(batch["segments"].sum(axis=-1).max()), 1)
        length = min(-(-longest // self._step) * self._step, self._model.context_length)
        return batch | {name: batch[name][..., :length] for name in ("inputs", "segments")}

    @property
    def needs_all_rows(self) -> bool:
        """Whether the shape of a batch depends on all of its rows, also those of other processes."""
        return self._model.stem == "tokens" and self._step < self._model.context_length

    def _read(self, i: int) -> Example:
        example = self._examples[i]
        if not 0 <= example.label < self._n_classes:
            raise UserError(
                f"config.data.path: example {i} of the {self._name} split has label {example.label}, and there are only the "
                f"classes 0 to {self._n_classes - 1}; mend it there, or leave the example out"
            )
        if len(example.inputs) != self._model.classifier.n_inputs:
            raise UserError(
                f"config.model.classifier.n_inputs={self._model.classifier.n_inputs}: example {i} of the {self._name} split has "
                f"{len(example.inputs)}; give that"
            )
        return example

    def _image(
        self, made: Callable[..., np.ndarray], i: int, example: Example, *how: Any
    ) -> np.ndarray:
        """The image of example i, uint8 [height,width,channels], at the size the model takes."""
        try:
            image = made(example.inputs[0], *how, resize=self._resize)
            channels = self._model.image.channels
            if image.shape[-1] != channels:
                raise ValueError(
                    f"it has {image.shape[-1]} channels where config.model.image.channels={channels}"
                )
        except ValueError as error:
            raise UserError(
                f"config.data.path: example {i} of the {self._name} split cannot be used: {error}"
            ) from error
        return image

    def _image_row(self, image: np.ndarray, label: int, other: int, share: float) -> Row:
        ones = np.ones(self._model.context_length, np.int32)
        return {"inputs": image, "segments": ones, **_target(label, other, share)}

    def _token_row(self, example: Example) -> Row:
        length = self._model.context_length
        inputs_IL = np.zeros((len(example.inputs), length), np.int32)
        segments_IL = np.zeros_like(inputs_IL)
        for ids_L, segments_L, given in zip(inputs_IL, segments_IL, example.inputs):
            ids_T = self._ids(given)
            if not isinstance(given, bytes) and given.ndim == 3 and len(ids_T) != length:
                raise UserError(
                    f"config.model.context_length={length}: an image of the {self._name} split has {len(ids_T)} pixels; give that"
                )
            ids_T = ids_T[:length]
            ids_L[: len(ids_T)] = ids_T
            segments_L[: len(ids_T)] = 1
        if len(inputs_IL) == 1:
            inputs_IL, segments_IL = inputs_IL[0], segments_IL[0]
        return {
            "inputs": inputs_IL,
            "segments": segments_IL,
            **_target(example.label, example.label, 1.0),
        }

    def _ids(self, given: Input) -> np.ndarray:
        if isinstance(given, bytes):
            assert (
                self._tokenizer is not None
            )  # bytes are text, and `pipeline.load` gives text its tokenizer
            return self._tokenizer.encode(given)
        return given if given.ndim == 1 else augment.grey_tokens(given)


def _target(label: int, other: int, share: float) -> Row:
    return {"label": np.int32(label), "other": np.int32(other), "share": np.float32(share)}
