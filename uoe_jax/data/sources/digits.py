"""scikit-learn's handwritten digits: 1797 real images, a part of the installed package."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from uoe_jax.data.examples import SPLITS, Example

N_CLASSES = 10
CUTS = (0.70, 0.85, 1.0)  # where train, validation and test end in every class


@dataclasses.dataclass(frozen=True, eq=False)
class DigitExamples:
    """Images uint8 [n,8,8,1] and their labels int [n], by index."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"digit {i} of {len(self)}")
        return Example((self.images[i],), int(self.labels[i]))


class Digits:
    """An `ExampleSource`: 8x8 grey pixels, 10 classes, split about 70/15/15 within each class.

    The split of an image follows from a hash of its index in the package's file; inside a split the
    images keep the file's order.
    """

    n_classes = N_CLASSES
    vocab_size = 0
    shape = (8, 8, 1)

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # a second

        loaded = load_digits()
        ink = loaded.images.astype(np.int64)  # 0 … 16
        images, labels = (
            (ink * 255 // 16).astype(np.uint8)[..., None],
            loaded.target.astype(np.int64),
        )
        self._sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        indices = split_indices(labels)
        self._splits = {s: DigitExamples(images[i], labels[i]) for s, i in indices.items()}

    def examples(self, split: str) -> DigitExamples:
        return self._splits[split]

    def record(self) -> dict[str, Any]:
        sizes = {split: len(self._splits[split]) for split in SPLITS}
        return {"sha256": self._sha256, "n_examples": sizes}


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """{split: ascending indices}: each class, by SHA-256 of 'digits/<index>', is cut at `CUTS`."""
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in range(N_CLASSES):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: hashlib.sha256(f"digits/{i}".encode()).digest())
        ends = [round(cut * len(members)) for cut in CUTS]
        for split, start, end in zip(SPLITS, [0, *ends], ends):
            chosen[split] += members[start:end]
    return {split: np.sort(np.asarray(indices, np.int64)) for split, indices in chosen.items()}
