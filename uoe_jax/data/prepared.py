"""What sources on disk share: datasets that are prepared once, and raw files that are hashed once.

A prepared dataset has TensorFlow Datasets' format (array_record) and the hash of its content in its
name: it is complete and right, or absent. tfds (0.4 s to import, no TensorFlow) only writes and
reads it; with `SequentialWriter`, as a `GeneratorBasedBuilder` would first collect a whole split.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np
from etils import epath

from uoe_jax.distributed.watchdog import tick, ticking
from uoe_jax.errors import RunError, UserError, os_error_as, reason
from uoe_jax.runtime_env import expanded
from uoe_jax.workdir import read_json, write_json

log = logging.getLogger(__name__)

ARENA = tuple("lra_release/" * n for n in range(3))  # where LRA's archive leaves its content
BATCH_BYTES = 8 << 20  # between two progress notes of tfds, which cost milliseconds
LINE_BYTES = 256 << 20
HASHED_BYTES = 1 << 20  # at a time
SETTLED_NS = 2_000_000_000  # a file system's coarsest clock: a younger file may change unnoticed

Record = Mapping[str, Any]
Splits = Mapping[str, Callable[[], Iterable[Record]]]


class Records:
    """Random access to one split of a dataset in tfds's format: dicts of its features."""

    def __init__(self, source: Any, split: str, damaged: Callable[[str], UserError]) -> None:
        """source: a data source of tfds. damaged: makes an error of what is wrong."""
        self._source, self._split, self._damaged = source, split, damaged

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        try:
            return self._source[i]
        except Exception as error:  # array_record and the decoders each raise their own
            raise self.wrong(i, f"cannot be read ({one_line(error)})") from error

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def many(self, indices: np.ndarray) -> list[dict[str, Any]]:
        try:
            return self._source.__getitems__(indices.tolist())
        except Exception:
            return [self[int(i)] for i in indices]  # names the damaged one

    def wrong(self, i: int, what: str) -> UserError:
        return self._damaged(f"example {i} of the split {self._split!r} {what}")


def open_records(directory: Path, split: str, n_records: int) -> Records:
    """A split of `dataset_directory` (imports tfds). Raises UserError where it is damaged."""
    import tensorflow_datasets as tfds

    try:
        source = tfds.builder_from_directory(str(directory)).as_data_source(split=split)
        n_found = len(source)
    except Exception as error:  # tfds, etils and array_record each raise their own
        raise _damaged(directory, one_line(error)) from error
    if n_found != n_records:
        wanted = f"where {n_records} were prepared"
        raise _damaged(directory, f"{n_found} records in its {split} split {wanted}")
    return Records(source, split, functools.partial(_damaged, directory))


def _damaged(directory: Path, what: str) -> UserError:
    remedy = f"the prepared dataset cannot be read ({what}): delete it and run again."
    return UserError(f"{directory.parent.parent}: {remedy}")


def one_line(error: Exception) -> str:
    """The kind of an error and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def dataset_directory(
    cache_dir: Path, key: str, name: str, version: str, fields: Mapping[str, type], splits: Splits
) -> Path:
    """The directory of the dataset `key`, for `open_records`; written first where it is absent.

    key: names the content; equal keys mean equal records. name, version: what tfds calls it; the
    version is three numbers. fields: of every record, in this order: `bytes` or `int`. splits:
    called once each, only where the dataset must be written; no split may be empty.
    """
    home = Path(cache_dir) / "sources" / key
    if not home.is_dir():
        with new_directory(home, "prepare the dataset") as new:
            _write(new / name / version, fields, splits)
    return home / name / version


@contextlib.contextmanager
def new_directory(home: Path, what: str) -> Iterator[Path]:
    """A directory to fill, which becomes `home` at the end, unless another process was first.

    `home` is complete or absent, also after a kill. Raises an OSError as RunError: cannot `what`.
    """
    remedy = "free space there or set UOE_CACHE elsewhere"
    with os_error_as(RunError, f"{home}: cannot {what}", remedy):
        home.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{home.name}-"
        with TemporaryDirectory(None, prefix, home.parent, ignore_cleanup_errors=True) as work:
            new = Path(work, "new")
            new.mkdir()
            yield new
            try:
                os.rename(new, home)
            except OSError:
                if not home.is_dir():
                    raise


def record_counts(directory: Path) -> dict[str, int]:
    """{split: number of records}, without importing tfds. Raises UserError where it is damaged."""
    try:
        splits = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))["splits"]
        return {split["name"]: sum(map(int, split["shardLengths"])) for split in splits}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, one_line(error)) from error


def _write(directory: Path, fields: Mapping[str, type], splits: Splits) -> None:
    """Writes a dataset record by record, in our order."""
    import tensorflow_datasets as tfds

    directory.mkdir(parents=True)
    kinds = {bytes: tfds.features.Text, int: lambda: tfds.features.Scalar(np.int64)}
    features = tfds.features.FeaturesDict({f: kinds[kind]() for f, kind in fields.items()})
    named = directory.parent.name, tfds.core.Version(directory.name), str(directory), __name__
    identity = tfds.core.dataset_info.DatasetIdentity(*named)
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    one_shard = {"max_examples_per_shard": 2**62}
    writer = tfds.core.SequentialWriter(info, **one_shard, file_format="array_record")
    writer.initialize_splits(list(splits))
    counts = dict.fromkeys(splits, 0)
    try:
        for split, records in splits.items():
            for batch in _batches(records()):
                writer.add_examples({split: batch})
                counts[split] += len(batch)
        writer.close_all()
    except BaseException as error:
        with contextlib.suppress(Exception):  # the first error is the one to report
            writer.close_all()
        if isinstance(error, RuntimeError):  # array_record's, such as of a full disk
            raise OSError(str(error)) from error
        raise
    for split, n_records in counts.items():
        open_records(directory, split, n_records)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch, size = list[Record](), 0
    for record in ticking(records):
        batch.append(record)
        size += 100 + sum(len(value) for value in record.values() if isinstance(value, bytes))
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class RawFiles:
    """Reads files by their SHA-256 and notices those that change."""

    def __init__(self, cache_dir: Path) -> None:
        # Each hash with path, size and times: reading 100 GB at every start would take minutes.
        self._memo = epath.Path(cache_dir) / "hashes.json"

    def sha256(self, files: Sequence[Path]) -> list[str]:
        """Of each file. Raises UserError for one that is unreadable or changes."""
        memo, hashes = self._remembered(), []
        new: dict[str, list[Any]] = {}
        try:
            for file in ticking(files):
                with readable(file):
                    name, times = os.path.abspath(file), _times(file)
                    known: Any = memo.get(name)
                    is_known = isinstance(known, list) and known[:-1] == times
                    if not is_known or not isinstance(known[-1], str):
                        known = [*times, _sha256(file)]
                        if _times(file) != times:
                            raise changed(file)
                        if time.time_ns() - max(times[1:]) > SETTLED_NS:
                            new[name] = known
                hashes.append(known[-1])
        finally:
            if new:  # also what was hashed before an interruption
                self._remember(new)
        return hashes

    def hashes(self, files: Mapping[str, Path]) -> tuple[dict[str, str], str]:
        """({name: hash of the file}, the hash over these); raises as `sha256`."""
        found = dict(zip(files, self.sha256(list(files.values())), strict=True))
        return found, hashlib.sha256("".join(found.values()).encode()).hexdigest()

    @contextlib.contextmanager
    def open(self, file: Path, sha256: str) -> Iterator[BinaryIO]:
        """Reads a file once. Raises UserError, at the end where it is not what was hashed."""
        with readable(file), open(file, "rb", buffering=0) as opened:
            raw = _HashedFile(opened)
            reader = io.BufferedReader(raw, HASHED_BYTES)
            yield reader
            while reader.read(HASHED_BYTES):
                pass
        if raw.digest.hexdigest() != sha256:
            self._remember({os.path.abspath(file): None})
            raise changed(file)

    def _remembered(self) -> dict[str, Any]:
        try:
            return read_json(self._memo, "files are hashed again") or {}
        except UserError as error:
            log.warning("%s", error)
            return {}

    def _remember(self, new: dict[str, Any]) -> None:
        memo = self._remembered() | new  # what others write meanwhile is hashed once more
        try:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memo, {file: v for file, v in memo.items() if v is not None})
        except OSError as error:
            what = "%s: cannot be written (%s); files are hashed again at the next start"
            log.warning(what, self._memo, error)


class _HashedFile(io.RawIOBase):
    """Reads an unbuffered file from its start. digest: of all that was read."""

    def __init__(self, file: io.FileIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:n])
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
    remedy = "fix or remove it, or set data.path to other data."
    raise UserError(f"{file}: cannot be read ({reason(error)}): {remedy}") from error


def changed(file: Path) -> UserError:
    return UserError(f"{file}: changed while it was being read: run again.")


class Reader(Protocol):  # a file, also one that is decompressed meanwhile
    def read(self, size: int, /) -> bytes: ...
    def readline(self, size: int, /) -> bytes: ...


def lines(reader: Reader, file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of `file`. Raises UserError for one above LINE_BYTES."""
    read = functools.partial(reader.readline, LINE_BYTES + 1)
    for number, line in enumerate(ticking(iter(read, b"")), 1):
        if len(line) > LINE_BYTES:
            remedy = f"is longer than {LINE_BYTES:,} bytes: cut it into several."
            raise UserError(f"{file}, line {number}: {remedy}")
        yield number, line


def manual_dir(path: str) -> Path:
    """data.path; where it is empty, the directory in which tfds expects manual downloads."""
    if path:
        return Path(expanded(path, "config.data.path"))
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(expanded(data_dir, "TFDS_DATA_DIR"), "downloads", "manual")


def _times(file: Path) -> list[int]:
    """[size, time of the last change of the content, and of the file's entry, both in ns]."""
    found = os.stat(file)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _sha256(file: Path) -> str:
    with open(file, "rb") as reader:
        return digest_of(reader)


def digest_of(reader: BinaryIO) -> str:
    """The SHA-256 of the rest of a reader, in hexadecimal."""
    digest = hashlib.sha256()
    for block in ticking(iter(functools.partial(reader.read, HASHED_BYTES), b"")):
        digest.update(block)
    return digest.hexdigest()
