"""scikit-learn's handwritten digits: 1797 real images that come with the package and are always there."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from uoe_jax.data.examples import Example
from uoe_jax.data.prepared import SPLITS

N_CLASSES = 10
PARTS = (0.70, 0.85, 1.0)  # of every class, where train, validation and test end


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
    """An `ExampleSource`: 8x8 pixels in grey and 10 classes, cut about 70/15/15 within each class.

    Which split an image is in follows from a hash of its index in the package's file alone; inside a split the images
    keep the file's order.
    """

    n_classes = N_CLASSES
    vocab_size = 0
    shape = (8, 8, 1)

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # a second

        loaded = load_digits()
        images = (loaded.images.astype(np.int64) * 255 // 16).astype(np.uint8)[
            ..., None
        ]  # of 16 levels of ink
        labels = loaded.target.astype(np.int64)
        self._sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        self._splits = {
            split: DigitExamples(images[indices], labels[indices])
            for split, indices in split_indices(labels).items()
        }

    def examples(self, split: str) -> DigitExamples:
        return self._splits[split]

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        return {
            "sha256": self._sha256,
            "n_examples": {split: len(self._splits[split]) for split in SPLITS},
        }


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Ascending indices per split: each class, in the order of SHA-256 of 'digits/<index>', is cut at `PARTS`."""
    chosen: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in range(N_CLASSES):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: hashlib.sha256(f"digits/{i}".encode()).digest())
        ends = [round(part * len(members)) for part in PARTS]
        for split, start, end in zip(SPLITS, [0, *ends], ends):
            chosen[split] += members[start:end]
    return {split: np.sort(np.asarray(indices, np.int64)) for split, indices in chosen.items()}
