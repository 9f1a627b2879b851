"""Labelled examples as rows of a batch: token ids padded to the context, or images, and a class."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config
from uoe_jax.data import augment
from uoe_jax.data.examples import Example, Examples, Input
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
        """name: of the split, for errors. tokenizer: of text; other inputs have their token ids."""
        self._examples, self._n_classes, self._name = examples, n_classes, name
        self._model, self._augment, self._tokenizer = config.model, config.augment, tokenizer
        facts = SOURCES[config.data.source].facts
        self._resize = facts is not None and facts.resize
        self._size = (config.model.image.height, config.model.image.width)
        self._step = -(-config.model.context_length // config.data.buckets)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> Row:
        example = self._read(i)
        if self._model.stem == "image":
            return _row(self._image(augment.fitted, i, example), self._ones(), example.label)
        return self._token_row(example)

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i as `seeds` draw it: an image is augmented and may be mixed with example `other`."""
        if self._model.stem != "image":
            return self[i]
        c, rng = self._augment, np.random.default_rng(seeds)
        augmented = functools.partial(augment.augmented, c=c, rng=rng)
        example = self._read(i)
        image = self._image(augmented, i, example)
        mix = augment.mixing(c, rng, *self._size)
        if mix is None:
            return _row(image, self._ones(), example.label)
        second = self._read(other)
        image = augment.mixed(image, self._image(augmented, other, second), mix)
        return _row(image, self._ones(), example.label, second.label, mix.share)

    def n_tokens(self, i: int) -> int:
        """The valid tokens of row i; of a pair, of the longer input."""
        return int(np.sum(self[i]["segments"], axis=-1).max())

    def padding_row(self) -> Row:
        return self._padding

    @functools.cached_property
    def _padding(self) -> Row:
        zeros = {name: np.zeros_like(a) for name, a in self[0].items()}
        return {**zeros, "label": np.int32(-1), "other": np.int32(-1)}

    def trimmed(self, batch: Batch) -> Batch:
        """A global batch cut to the bucket of its longest row (data.buckets)."""
        if not self.needs_all_rows:
            return batch
        longest = max(int(batch["segments"].sum(axis=-1).max()), 1)
        length = min(-(-longest // self._step) * self._step, self._model.context_length)
        return batch | {name: batch[name][..., :length] for name in ("inputs", "segments")}

    @property
    def needs_all_rows(self) -> bool:
        return self._model.stem == "tokens" and self._step < self._model.context_length

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

    def _image(self, make: Callable[..., np.ndarray], i: int, example: Example) -> np.ndarray:
        """The image of example i, uint8 [height,width,channels], at the size the model takes."""
        height, width = self._size
        channels = self._model.image.channels
        try:
            image = make(example.inputs[0], height=height, width=width, resize=self._resize)
            if image.shape[-1] != channels:
                key = f"config.model.image.channels={channels}"
                raise ValueError(f"it has {image.shape[-1]} channels where {key}")
        except ValueError as error:
            what = f"example {i} of the {self._name} split cannot be used: {error}"
            raise UserError(f"config.data.path: {what}") from error
        return image

    def _ones(self) -> np.ndarray:
        return np.ones(self._model.context_length, np.int32)

    def _token_row(self, example: Example) -> Row:
        length = self._model.context_length
        inputs_IL = np.zeros((len(example.inputs), length), np.int32)
        segments_IL = np.zeros_like(inputs_IL)
        for ids_L, segments_L, given in zip(inputs_IL, segments_IL, example.inputs):
            ids_T = self._ids(given)
            if not isinstance(given, bytes) and given.ndim == 3 and len(ids_T) != length:
                found = f"an image of the {self._name} split has {len(ids_T)} pixels; give that"
                raise UserError(f"config.model.context_length={length}: {found}")
            ids_T = ids_T[:length]
            ids_L[: len(ids_T)] = ids_T
            segments_L[: len(ids_T)] = 1
        if len(inputs_IL) == 1:
            inputs_IL, segments_IL = inputs_IL[0], segments_IL[0]
        return _row(inputs_IL, segments_IL, example.label)

    def _ids(self, given: Input) -> np.ndarray:
        if isinstance(given, bytes):
            assert self._tokenizer is not None  # `pipeline.load` gives text its tokenizer
            return self._tokenizer.encode(given)
        return given if given.ndim == 1 else augment.grey_tokens(given)


def _row(
    inputs: np.ndarray, segments: np.ndarray, label: int, other: int | None = None, share: float = 1
) -> Row:
    other = label if other is None else other
    target: Row = {"label": np.int32(label), "other": np.int32(other), "share": np.float32(share)}
    return {"inputs": inputs, "segments": segments, **target}
