"""Miniature data sets with the schema of the named ones, written with TFDS."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

Features = dict[str, Any]

Rows = dict[str, list[dict[str, Any]]]  # by split


def write(
    root: Path,
    dataset: str,
    version: str,
    features: Features,
    rows: Rows,
    config: str = "",
    shards: int = 1,
) -> Path:
    """Prepares `rows`, in their order, as array_record in the directory layout of tfds. Returns the directory."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in rows}

        def _generate_examples(self, split):
            yield from enumerate(rows[split])

    tfds.disable_progress_bar()
    builder = Builder(data_dir=root, file_format="array_record")
    how = tfds.download.DownloadConfig(num_shards=shards) if shards > 1 else None
    builder.download_and_prepare(download_config=how)
    return Path(builder.data_dir)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def cifar_features(**changes: Any) -> Features:
    """The true ones, read from tfds itself."""
    return {**tfds.builder("cifar10").info.features, **changes}


def cifar_rows(train: int, test: int) -> tuple[Rows, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    images = {
        s: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        for s, n in (("train", train), ("test", test))
    }
    rows = {
        split: [
            {"id": f"{split}_{i}", "image": png(image), "label": i % 10}
            for i, image in enumerate(some)
        ]
        for split, some in images.items()
    }
    return rows, images


def write_cifar(
    root: Path, train: int = 40, test: int = 7, shards: int = 1
) -> tuple[Path, dict[str, np.ndarray]]:
    rows, images = cifar_rows(train, test)
    return write(root, "cifar10", "3.0.2", cifar_features(), rows, shards=shards), images


def write_imdb(root: Path, rows: Rows) -> Path:
    features = {"label": tfds.features.ClassLabel(num_classes=2), "text": tfds.features.Text()}
    return write(root, "imdb_reviews", "1.0.0", features, rows, config="plain_text")


def reviews(**sizes: int) -> Rows:
    return {
        split: [{"text": f"<br />{split} {i} é".encode(), "label": i * 2 // n} for i in range(n)]
        for split, n in sizes.items()
    }
