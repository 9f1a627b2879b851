"""What sources on disk share: datasets that are prepared once, and raw files that are hashed once.

A prepared dataset is one in TensorFlow Datasets' format (array_record), named by the hash of what it was made from, so
that it is complete and right, or absent. No TensorFlow is needed, neither to write nor to read, and tfds itself (0.4 s to
import) is only imported where there is something to write or to read.

tfds's `SequentialWriter` writes, not a `GeneratorBasedBuilder`: the latter collects a split before it writes it, in memory
up to 1 GB and beyond that through TensorFlow. Its order is ours, so no release of tfds can change what a seed means.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np

from uoe_jax.distributed.watchdog import tick, ticking
from uoe_jax.errors import RunError, UserError
from uoe_jax.runtime_env import expanded

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
ARENA = tuple(
    "lra_release/" * n for n in range(3)
)  # where unpacking Long Range Arena's archive leaves what is in it
BATCH_BYTES = 8 << 20  # between two of tfds's notes of how far it is, which cost milliseconds
LINE_BYTES = 256 << 20
HASHED_BYTES = 1 << 20  # at a time
SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system: what is younger may change and keep its time

Record = Mapping[str, Any]


# ---- datasets -----------------------------------------------------------------------------------------------------


class Records:
    """Random access to the records of one split: dicts of the fields that were prepared, text as bytes."""

    def __init__(self, directory: Path, split: str, n_records: int) -> None:
        """Opens a split of `n_records` (imports tfds). Raises UserError where its files are damaged, as reading does."""
        import tensorflow_datasets as tfds

        self._directory = directory
        self._split = split
        try:
            self._records = tfds.builder_from_directory(str(directory)).as_data_source(split=split)
            found = len(self._records)
        except Exception as error:  # tfds, etils and array_record each raise their own
            raise damaged(directory, error) from error
        if found != n_records:
            raise damaged(
                directory, f"{found} records in its {split} split where {n_records} were prepared"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(
                f"record {index} of {len(self)}"
            )  # array_record's is a ValueError: no end of iteration
        try:
            return self._records[index]
        except Exception as error:
            raise damaged(
                self._directory, f"record {index} of its {self._split} split: {error!r}"
            ) from error


class Documents(Records):
    """The bytes of the field "text" of each record."""

    def __getitem__(self, index: int) -> bytes:
        return super().__getitem__(index)["text"]

    def __iter__(self) -> Iterator[bytes]:
        return ticking(map(self.__getitem__, range(len(self))))


def damaged(directory: Path, what: object) -> UserError:
    """That the dataset at `directory`, two levels below its name in the cache, is not what was written."""
    what = what if isinstance(what, str) else repr(what)
    return UserError(
        f"{directory.parent.parent}: the prepared dataset cannot be read ({what}): delete it and run again."
    )


def dataset_directory(
    cache_dir: Path,
    key: str,
    name: str,
    version: str,
    fields: Mapping[str, type],
    splits: Mapping[str, Callable[[], Iterable[Record]]],
) -> Path:
    """Where the dataset `key` lies, for `Records`; it is written first where it is not there.

    Args:
      key: names the content; equal keys mean equal records.
      name, version: what tfds calls it; the version is three numbers.
      fields: of every record, in this order: `bytes` or `int`.
      splits: called, each at most once, only where the dataset must be written; every split needs a record.

    Any number of processes may do this at once: each writes beside the final directory and renames; the first one wins,
    and a process that is killed leaves nothing under the final name. Raises RunError where the cache cannot be written.
    """
    home = Path(cache_dir) / "sources" / key
    if not home.is_dir():
        _build(home, name, version, fields, splits)
    return home / name / version


def record_counts(directory: Path) -> dict[str, int]:
    """How many records each split has, without importing tfds. Raises UserError where that note is damaged."""
    try:
        splits = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))["splits"]
        return {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(directory, error) from error


def _build(
    home: Path,
    name: str,
    version: str,
    fields: Mapping[str, type],
    splits: Mapping[str, Callable[[], Iterable[Record]]],
) -> None:
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        try:
            directory = work / name / version
            directory.mkdir(parents=True)
            counts = _write(directory, name, version, fields, splits)
            for split, n_records in counts.items():
                Records(directory, split, n_records)
            try:
                os.rename(work, home)
            except OSError:
                if (
                    not home.is_dir()
                ):  # else another process was first, and its result is the same as ours
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (
        OSError,
        RuntimeError,
    ) as error:  # array_record's errors are RuntimeErrors, a full disk among them
        raise RunError(
            f"{home}: cannot prepare the dataset ({error}): free space there or set UOE_CACHE elsewhere."
        ) from error


def _write(
    directory: Path,
    name: str,
    version: str,
    fields: Mapping[str, type],
    splits: Mapping[str, Callable[[], Iterable[Record]]],
) -> dict[str, int]:
    """Writes the splits one after another, record by record; returns how many records each has."""
    import tensorflow_datasets as tfds

    features = {bytes: tfds.features.Text, int: lambda: tfds.features.Scalar(np.int64)}
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name, tfds.core.Version(version), str(directory), __name__
        ),
        features=tfds.features.FeaturesDict(
            {field: features[kind]() for field, kind in fields.items()}
        ),
        disable_shuffling=True,
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=2**62, file_format="array_record"
    )
    writer.initialize_splits(list(splits))
    counts = dict.fromkeys(splits, 0)
    try:
        for split, records in splits.items():
            for batch in _batches(records()):
                writer.add_examples({split: batch})
                counts[split] += len(batch)
        writer.close_all()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            writer.close_all()
        raise
    return counts


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in ticking(records):
        batch.append(record)
        size += 100 + sum(len(value) for value in record.values() if isinstance(value, bytes))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- raw files ----------------------------------------------------------------------------------------------------


class RawFiles:
    """Reads files by their SHA-256, and notices those that change.

    A hash is remembered in `cache_dir` by path, size and times, as reading 100 GB at every start would take minutes.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._memo = Path(cache_dir) / "hashes.json"

    def sha256(self, files: Sequence[Path]) -> list[str]:
        """Of each file's bytes, in hexadecimal. Raises UserError for one that cannot be read or changes meanwhile."""
        memo = self._remembered()
        new: dict[str, list[Any]] = {}
        hashes = []
        try:
            for file in ticking(files):
                known = memo.get(os.path.abspath(file))
                times = _times(file)
                if isinstance(known, list) and known[:-1] == times and isinstance(known[-1], str):
                    hashes.append(known[-1])
                    continue
                hashes.append(_sha256(file))
                if _times(file) != times:
                    raise changed(file)
                if time.time_ns() - max(times[1:]) > SETTLED_NS:
                    new[os.path.abspath(file)] = [*times, hashes[-1]]
        finally:
            if new:  # also what was hashed before an interruption
                self._remember(new)
        return hashes

    @contextlib.contextmanager
    def open(self, file: Path, sha256: str) -> Iterator[BinaryIO]:
        """The file, to be read once from its beginning on.

        Raises UserError where it cannot be read or decompressed and, at the end, where it is not what was hashed.
        """
        digest = hashlib.sha256()
        with readable(file):
            with open(file, "rb", buffering=0) as raw:
                reader = io.BufferedReader(_Hashed(raw, digest), 1 << 20)
                yield reader
                while reader.read(1 << 20):
                    pass
        if digest.hexdigest() != sha256:
            self._remember({os.path.abspath(file): None})
            raise changed(file)

    def _remembered(self) -> dict[str, Any]:
        try:
            memo = json.loads(self._memo.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s: damaged (%s); files are hashed again", self._memo, error)
            return {}
        return memo if isinstance(memo, dict) else {}

    def _remember(self, new: Mapping[str, list[Any] | None]) -> None:
        from uoe_jax.workdir import write_json

        # What another process writes between the two lines is hashed once more by whoever needs it.
        memo = {**self._remembered(), **new}
        try:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                self._memo, {file: known for file, known in memo.items() if known is not None}
            )
        except OSError as error:
            log.warning(
                "%s: cannot be written (%s); files are hashed again at the next start",
                self._memo,
                error,
            )


class _Hashed(io.RawIOBase):
    """A raw file that updates a digest with all that is read from it."""

    def __init__(self, raw: io.RawIOBase, digest: Any) -> None:
        self._raw = raw
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._raw.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:n])
        tick()
        return n


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns the errors of reading or decompressing `file` into a UserError."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        refuse(file, error)


def refuse(file: Path | str, error: Exception) -> NoReturn:
    """Raises the UserError that `file` cannot be read."""
    reason = getattr(error, "strerror", None) or error
    raise UserError(
        f"{file}: cannot be read ({reason}): mend or remove it, or set data.path to other data."
    ) from error


def changed(file: Path) -> UserError:
    return UserError(f"{file}: changed while it was being read: run again.")


class Reader(Protocol):
    """What bytes are read from: a file, also one that is decompressed as it is read."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


def lines(reader: Reader, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of what is read from `file`. Raises UserError for a line above LINE_BYTES."""
    number = 0
    while line := reader.readline(LINE_BYTES + 1):
        number += 1
        tick()
        if len(line) > LINE_BYTES:
            raise UserError(
                f"{file}, line {number}: is longer than {LINE_BYTES:,} bytes: cut it into several."
            )
        yield number, line


def manual_dir(path: str) -> Path:
    """data.path; where that is empty, the place where tfds wants what a person has downloaded by hand."""
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if path:
        return Path(expanded(path, "config.data.path"))
    return Path(expanded(data_dir, "TFDS_DATA_DIR"), "downloads", "manual")


def _times(file: Path) -> list[int]:
    """[size, time of the last change of the content, and of the file's entry, both in ns]."""
    with readable(file):
        found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(file: Path) -> str:
    with readable(file), open(file, "rb") as reader:
        return digest_of(reader)


def digest_of(reader: BinaryIO) -> str:
    """The SHA-256 of what is left to read, in hexadecimal."""
    digest = hashlib.sha256()
    while block := reader.read(HASHED_BYTES):
        digest.update(block)
        tick()
    return digest.hexdigest()
