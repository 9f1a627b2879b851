"""Long Range Arena's Retrieval task: does one paper of the ACL Anthology Network cite the other?

The three files of the release (Tay et al., 2021, arXiv:2011.04006) are read as its input pipeline
reads them (lra_benchmarks/matching/input_pipeline.py): no header, fields between tabs, quotation
marks and backslashes kept.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from uoe_jax.data import prepared
from uoe_jax.data.examples import Example, Indexed, LabelledSource
from uoe_jax.errors import ConfigError

VERSION = "1.0.0"  # of the rules below: raise it when examples or their order change
FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
BELOW = ("", *(folder + "tsv_data" for folder in prepared.ARENA))
REMEDY = (
    "download lra_release.gz of Long Range Arena (7.7 GB, a tar archive), unpack it, and set "
    "data.path to its folder tsv_data."
)
UNPACK = "unpack it again from Long Range Arena's lra_release.gz."


def open_aan(path: str, cache_dir: Path) -> LabelledSource:
    """Prepares the pairs once, from the directory `path` or the release unpacked below it.

    Inputs are (text1, text2) as bytes, in the order of the files; labels are 0 or 1. The release
    has 147,086, 18,090 and 17,437 pairs.
    """
    root = prepared.manual_dir(path)
    origin = min((root / below for below in BELOW), key=lambda folder: len(_missing(folder)))
    if missing := ", ".join(_missing(origin)):
        raise ConfigError("data.path", path, f"{missing} not in {origin}: {REMEDY}")
    files = {split: origin / name for split, name in FILES.items()}
    raw = prepared.RawFiles(cache_dir)
    hashes, sha256 = raw.hashes(files)
    key = f"aan-{VERSION}-{sha256[:24]}"
    fields = {"label": int, "text1": bytes, "text2": bytes}
    splits = {s: functools.partial(_records, file, hashes[s], raw) for s, file in files.items()}
    home = prepared.dataset_directory(cache_dir, key, "lra_aan", VERSION, fields, splits)
    sizes = prepared.record_counts(home)

    def examples(split: str) -> Indexed:
        records = prepared.open_records(home, split, sizes[split])

        def read(i: int) -> Example:
            record = records[i]
            return Example((record["text1"], record["text2"]), int(record["label"]))

        return Indexed(len(records), read)

    facts = {"directory": str(origin.resolve()), "sha256": sha256, "n_examples": sizes}
    return LabelledSource(2, examples, facts)


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES.values() if not (folder / name).is_file()]


def _records(file: Path, sha256: str, raw: prepared.RawFiles) -> Iterator[dict[str, bytes | int]]:
    number = 0
    with raw.open(file, sha256) as reader:
        for number, line in prepared.lines(reader, file):
            fields = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            label = _label(fields[0])
            if len(fields) != 5:
                wrong = f"has {len(fields)} fields between tabs instead of 5"
            elif label is None:
                wrong = f"has the label {fields[0][:40]!r} instead of 0 or 1"
            elif not (fields[3] and fields[4]):
                wrong = "has an empty text"
            else:
                yield {"label": label, "text1": fields[3], "text2": fields[4]}
                continue
            remedy = f"(label, id1, id2, text1, text2): fix the line, or {UNPACK}"
            raise ConfigError("data.path", f"{file}, line {number}", f"{wrong} {remedy}")
    if not number:
        raise ConfigError("data.path", str(file), f"is empty: {UNPACK}")


def _label(text: bytes) -> int | None:
    """0 or 1; None for anything else."""
    try:
        return {0.0: 0, 1.0: 1}.get(float(text))
    except ValueError:
        return None
