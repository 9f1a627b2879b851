"""Long Range Arena's Retrieval task: does one paper of the ACL Anthology Network cite the other? (data.source='aan')

The three files of the release (Tay et al., 2021, arXiv:2011.04006) are read as its own input pipeline reads them
(lra_benchmarks/matching/input_pipeline.py): no header, fields between tabs, quotation marks and backslashes as they stand.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uoe_jax.data.examples import Example
from uoe_jax.data.prepared import (
    ARENA,
    RawFiles,
    Records,
    dataset_directory,
    lines,
    manual_dir,
    record_counts,
)
from uoe_jax.errors import ConfigError

VERSION = "1.0.0"  # of the rules below: raise it when the examples or their order change, or the cache goes stale
FILES = {split: f"new_aan_pairs.{name}.tsv" for split, name in
         (("train", "train"), ("validation", "eval"), ("test", "test"))}  # fmt: skip
BELOW = ("", *(folder + "tsv_data" for folder in ARENA))


class Pairs(Records):
    """One split of pairs of texts, by index, in the order of the file."""

    def __getitem__(self, index: int) -> Example:
        record = super().__getitem__(index)
        return Example((record["text1"], record["text2"]), int(record["label"]))


@dataclasses.dataclass(frozen=True)
class Aan:
    """The prepared pairs.

    Attributes:
      key: names this content under these rules.
      directory: the tfds directory, for `tfds.builder_from_directory`.
      origin: the directory of the three files.
      sha256: over the hashes of the three files.
      n_examples: per split (the release has 147,086, 18,090 and 17,437).
    """

    key: str
    directory: Path
    origin: Path
    sha256: str
    n_examples: dict[str, int]
    n_classes: int = 2
    vocab_size: int = 0

    def examples(self, split: str) -> Pairs:
        """Inputs (text1, text2) as bytes, label 0 or 1 (imports tfds). Raises UserError where the files are damaged."""
        return Pairs(self.directory, split, self.n_examples[split])

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        return {"directory": str(self.origin), "sha256": self.sha256, "n_examples": self.n_examples}


def open_aan(path: str, cache_dir: Path) -> Aan:
    """Prepares the pairs once, from the three files in the directory `path`, or where the release is unpacked below it.

    An empty path is the place where tfds wants what was downloaded by hand. Raises ConfigError where a file is missing and,
    with file and line, where a line is no pair; UserError for a file that cannot be read.
    """
    origin = _locate(path)
    files = {split: origin / name for split, name in FILES.items()}
    raw = RawFiles(cache_dir)
    hashes = dict(zip(files, raw.sha256(list(files.values())), strict=True))
    sha256 = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    key = f"aan-{VERSION}-{sha256[:24]}"
    fields = {"label": int, "text1": bytes, "text2": bytes}
    splits = {
        split: functools.partial(_records, file, hashes[split], raw)
        for split, file in files.items()
    }
    directory = dataset_directory(cache_dir, key, "lra_aan", VERSION, fields, splits)
    return Aan(key, directory, origin.resolve(), sha256, record_counts(directory))


def _locate(path: str) -> Path:
    root = manual_dir(path)
    remedy = (
        "download lra_release.gz of Long Range Arena (7.7 GB, a tar archive), unpack it, and set data.path to its folder "
        "tsv_data."
    )
    for folder in (root / below for below in BELOW):
        missing = [name for name in FILES.values() if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(FILES):
            raise ConfigError(
                "data.path", path, f"{', '.join(missing)} is missing in {folder}: {remedy}"
            )
    raise ConfigError("data.path", path, f"{', '.join(FILES.values())} are not in {root}: {remedy}")


def _records(file: Path, sha256: str, raw: RawFiles) -> Iterator[dict[str, bytes | int]]:
    number = 0
    with raw.open(file, sha256) as reader:
        for number, line in lines(reader, file):
            fields = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if len(fields) != 5:
                raise _no_pair(file, number, f"has {len(fields)} fields between tabs instead of 5")
            label, _, _, text1, text2 = fields
            try:
                value = float(label)
            except ValueError:
                value = -1.0
            if value not in (0, 1):
                raise _no_pair(file, number, f"has the label {label[:40]!r} instead of 0 or 1")
            if not (text1 and text2):
                raise _no_pair(file, number, "has an empty text")
            yield {"label": int(value), "text1": text1, "text2": text2}
    if not number:
        raise ConfigError(
            "data.path",
            str(file),
            "is empty: unpack it again from Long Range Arena's lra_release.gz.",
        )


def _no_pair(file: Path, number: int, what: str) -> ConfigError:
    remedy = "mend the line, or unpack the file again from Long Range Arena's lra_release.gz."
    return ConfigError(
        "data.path", f"{file}, line {number}", f"{what} (label, id1, id2, text1, text2): {remedy}"
    )
