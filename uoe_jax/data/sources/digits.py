"""scikit-learn's handwritten digits: 1797 real images, a part of the installed package."""

import hashlib

import numpy as np

from uoe_jax.data.examples import SPLITS, Example, Indexed, LabelledSource

N_CLASSES = 10
CUTS = (0.70, 0.85, 1.0)  # where train, validation and test end in every class


def open_digits() -> LabelledSource:
    """Images uint8 [8,8,1] in 10 classes, in the file's order within a split.

    Each class, ordered by SHA-256 of 'digits/<index in the package's file>', is cut at `CUTS`.
    """
    from sklearn.datasets import load_digits  # a second

    loaded = load_digits()
    ink = loaded.images.astype(np.int64)  # 0 … 16
    images, labels = (ink * 255 // 16).astype(np.uint8)[..., None], loaded.target.astype(np.int64)
    indices: dict[str, list[int]] = {split: [] for split in SPLITS}
    for label in range(N_CLASSES):
        members = np.flatnonzero(labels == label).tolist()
        members.sort(key=lambda i: hashlib.sha256(f"digits/{i}".encode()).digest())
        ends = [round(cut * len(members)) for cut in CUTS]
        for split, start, end in zip(SPLITS, [0, *ends], ends):
            indices[split] = sorted(indices[split] + members[start:end])

    def examples(split: str) -> Indexed:
        at = indices[split]
        return Indexed(len(at), lambda i: Example((images[at[i]],), int(labels[at[i]])))

    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    sizes = {split: len(at) for split, at in indices.items()}
    return LabelledSource(N_CLASSES, examples, {"sha256": sha256, "n_examples": sizes})
