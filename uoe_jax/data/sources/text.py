"""A person's own text: files of plain text or of JSON lines, read as a stream and never whole (data.source='text')."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uoe_jax.data.prepared import RawFiles, Reader, lines, refuse
from uoe_jax.data.sources.formats import BOM, Format, keys_of, look, refuse_array
from uoe_jax.distributed import coordination
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError
from uoe_jax.runtime_env import expanded

VERSION = "1.0.0"  # of the rules below: raise it when the documents, their split or order change, or caches go stale
DOCUMENT_BYTES = 64 << 10
TAKEN = (".txt", ".jsonl", ".ndjson")  # of a directory, in any case, each also with .gz behind it
SHOWN = 3  # names of files that were passed over


@dataclasses.dataclass(frozen=True)
class TextFile:
    """One file: where it is, the SHA-256 of its bytes on disk, and how they are read."""

    path: Path
    sha256: str
    format: Format

    @property
    def content(self) -> tuple[str | bool, ...]:
        """All that its documents depend on; the mark told apart, as it was once read as text."""
        found = self.format
        return self.sha256, found.packed, found.json_lines, *(["bom"] if found.bom else [])


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """The documents of some files.

    A line of a JSON-lines file is a document: its field "text", of any length; empty lines and empty texts are passed
    over. Any other file is text: one document, or several of at most 64 KiB that are cut at the ends of lines (inside a
    longer line, between two characters) and give the file back when they are put together. A
    byte-order mark at the head of a file is no part of it. `formats.look` says which file is
    gzipped, and which is JSON lines.

    A document is of the training split, the validation split or the test split by the hash of its bytes:
    equal documents never fall into two splits, and added files move no document. Files are read in the order of their
    hashes, so neither names nor places matter.

    Attributes:
      key: names the documents and their order; caches derived from them are keyed by it.
      path: data.path as it was written.
      held_out: percent of the documents that are of validation, and as many of test, about.
      files: those that are not empty, in reading order.
      n_bytes, n_empty: the bytes of `files` on disk, and how many files were passed over because they are empty.
      n_passed_over: the other files of a directory, which are not taken because of their names.
    """

    key: str
    path: str
    held_out: int
    files: tuple[TextFile, ...]
    sha256: str
    n_bytes: int
    n_empty: int
    n_passed_over: int
    raw: RawFiles

    def documents(self, split: str) -> Iterator[bytes]:
        """The split's documents, one by one.

        Raises ConfigError with file and place for bytes that are not UTF-8 and a line that is no document, and at the end
        where the split holds none; UserError for a file that cannot be read or changes meanwhile.
        """
        n_documents = n_yielded = 0
        for file in self.files:
            for document in _documents(file, self.raw):
                n_documents += 1
                if split_of(document, self.held_out) == split:
                    n_yielded += 1
                    yield document
        if not n_documents:
            raise ConfigError(
                "data.path", self.path, f"its {len(self.files)} files hold no text: name others."
            )
        if not n_yielded:
            remedy = (
                f"its {n_documents} documents leave the {split} split empty (a document goes to train/validation/test by "
                f"a hash of its content, {100 - 2 * self.held_out}/{self.held_out}/{self.held_out}; a text file is one document per 64 KiB): "
                "add files, cut long ones, or raise data.held_out."
            )
            raise ConfigError("data.path", self.path, remedy)

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "n_files": len(self.files),
            "n_bytes": self.n_bytes,
            "n_empty_files": self.n_empty,
            "n_passed_over": self.n_passed_over,
        }


def open_text(path: str, cache_dir: Path, held_out: int = 1, quiet: bool = False) -> TextFiles:
    """The text under a directory (its .txt, .jsonl and .ndjson files, also .gz, at any depth) or of the files of a glob.

    In a glob, `**` is any depth and .json is JSON lines too. Hidden files and directories are
    passed over; other files of a directory are, too, and process 0 says so unless `quiet`.
    Raises ConfigError where there is no such file, all are empty or one is in another format;
    UserError for one that cannot be read.
    """
    others: list[str] = []
    found = find(path, others)
    sizes = {file: _size(file) for file in ticking(found)}
    full = [file for file in found if sizes[file]]
    if not full:
        raise ConfigError(
            "data.path", path, f"its {len(found)} files are all empty: name files with text."
        )
    formats = [look(file) for file in ticking(full)]
    if others and not quiet and os.environ.get(coordination.PROCESS_ID, "0") in ("", "0"):
        n_files = len(others) + len(found)
        passed_over = f"{len(others)} of {n_files} files passed over ({_few(others)})"
        read = ".txt, .jsonl and .ndjson are read, also gzipped; name others by a glob"
        print(f"uoe: data.path={path}: {passed_over}; {read}", file=sys.stderr, flush=True)
    raw = RawFiles(cache_dir)
    hashes = raw.sha256(full)
    named = (TextFile(*of_file) for of_file in zip(full, hashes, formats, strict=True))
    files = sorted(named, key=lambda file: file.content)
    sha256 = hashlib.sha256(json.dumps([file.content for file in files]).encode()).hexdigest()
    return TextFiles(
        key=f"text-{VERSION}-{sha256[:24]}" + (f"-{held_out}" if held_out != 1 else ""),
        path=path,
        held_out=held_out,
        files=tuple(files),
        sha256=sha256,
        n_bytes=sum(sizes.values()),
        n_empty=len(found) - len(full),
        n_passed_over=len(others),
        raw=raw,
    )


def split_of(document: bytes, held_out: int = 1) -> str:
    """The split of a document by the hash of its bytes; held_out: percent for validation, and for test."""
    percent = int.from_bytes(hashlib.sha256(document).digest()[:8], "big") % 100
    return (
        "train"
        if percent < 100 - 2 * held_out
        else "validation"
        if percent < 100 - held_out
        else "test"
    )


def find(path: str, others: list[str] | None = None) -> list[Path]:
    """The files that data.path names, in the order of their names, each of them once.

    others: is given the names, below the directory, of the files in it that are not taken.
    """
    passed_over: list[str] = [] if others is None else others
    if not path:
        remedy = (
            "set it to a directory of .txt or .jsonl files, or to a glob such as 'DIR/**/*.txt'."
        )
        raise ConfigError("data.path", path, remedy)
    pattern = expanded(path, "config.data.path")
    if os.path.isdir(pattern):
        names = []
        for name in _walk(pattern):
            if name.lower().removesuffix(".gz").endswith(TAKEN):
                names.append(name)
            elif os.path.isfile(name):
                passed_over.append(os.path.relpath(name, pattern))
        passed_over.sort()
        there = f" but {len(passed_over)} other files ({_few(passed_over)})" if passed_over else ""
        remedy = "name a directory that does, or others by a glob."
        missing = f"holds no .txt, .jsonl or .ndjson file (also .gz){there}: {remedy}"
    else:
        head, rest = _head(pattern)
        if "**" in rest:
            # glob itself passes over directories that cannot be read.
            list(_walk(os.path.join(".", head)))
        exists = os.path.exists(pattern)
        names = (
            [pattern]
            if exists
            else glob.glob(os.path.join(glob.escape(head), rest), recursive=True)
        )
        missing = "is neither a directory nor a glob of files on this machine: name one of text or JSON lines."
    files: dict[str, Path] = {}
    for name in sorted(names, key=os.fsencode):
        if _is_file(name):
            files.setdefault(os.path.realpath(name), Path(name))
    if not files:
        raise ConfigError("data.path", path, missing)
    return list(files.values())


def _few(names: list[str]) -> str:
    """The first of some names, on one line."""
    shown = [name if name.isprintable() else repr(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > SHOWN else "")


def _head(pattern: str) -> tuple[str, str]:
    """(the directory that a glob begins with, the pattern below it); a directory that is named `fold[1]` is no pattern."""
    parts = Path(pattern).parts
    for n, part in enumerate(parts):
        matches_itself = fnmatch.fnmatchcase(
            part, part
        )  # as `*` does, which then means others as well
        if glob.has_magic(part) and (
            matches_itself or not os.path.isdir(os.path.join(*parts[: n + 1]))
        ):
            return os.path.join("", *parts[:n]), os.path.join(*parts[n:])
    return os.path.join("", *parts[:-1]), os.path.join("", *parts[-1:])


def _walk(root: str) -> Iterator[str]:
    """The files below, also behind links; hidden ones are left out. Raises UserError for an unreadable directory."""
    seen = {os.path.realpath(root)}

    def is_new(folder: str) -> bool:
        real = os.path.realpath(folder)
        if real in seen:
            return False
        seen.add(real)
        return True

    def refused(error: OSError) -> None:
        refuse(str(error.filename), error)

    for folder, folders, leaves in os.walk(root, onerror=refused, followlinks=True):
        folders[:] = [
            f for f in sorted(folders) if not f.startswith(".") and is_new(os.path.join(folder, f))
        ]
        yield from (
            os.path.join(folder, leaf) for leaf in ticking(leaves) if not leaf.startswith(".")
        )


def _is_file(name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name).st_mode)
    except OSError as error:
        refuse(name, error)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        refuse(file, error)


def _documents(file: TextFile, raw: RawFiles) -> Iterator[bytes]:
    packed, json_lines, bom = file.format
    with raw.open(file.path, file.sha256) as opened, contextlib.ExitStack() as stack:
        reader: Reader = stack.enter_context(gzip.GzipFile(fileobj=opened)) if packed else opened
        offset = len(reader.read(len(BOM))) if bom else 0
        if json_lines:
            yield from _from_json_lines(reader, file.path)
        else:
            yield from _from_text(reader, file.path, offset)


def _from_text(reader: Reader, file: Path, offset: int = 0) -> Iterator[bytes]:
    """offset: of the reader, in bytes."""
    rest = b""
    while rest := rest + reader.read(DOCUMENT_BYTES + 1 - len(rest)):
        document = rest[: _cut(rest)]
        try:
            document.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{file}, byte {offset + error.start}") from error
        yield document
        offset += len(document)
        rest = rest[len(document) :]


def _cut(data: bytes) -> int:
    """Where the first document of `data` ends, which is the rest of a file or more than a document."""
    if len(data) <= DOCUMENT_BYTES:
        return len(data)
    if end := data.rfind(b"\n", 0, DOCUMENT_BYTES) + 1:
        return end
    # The byte at a cut begins a character: in UTF-8 at most three bytes 10xxxxxx follow the first.
    starts = (
        end for end in range(DOCUMENT_BYTES, DOCUMENT_BYTES - 4, -1) if data[end] & 0xC0 != 0x80
    )
    return next(starts, DOCUMENT_BYTES)


def _from_json_lines(reader: Reader, file: Path) -> Iterator[bytes]:
    may_be_array = file.name.lower().removesuffix(".gz").endswith(".json")
    for number, line in lines(reader, file):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        if may_be_array and line.lstrip().startswith(b"["):
            refuse_array(str(file))
        may_be_array = False
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{where}, byte {error.start} of the line") from error
        except (ValueError, RecursionError) as error:
            remedy = f"is no JSON of its own ({error}): mend it, or take the file out of data.path."
            raise ConfigError("data.path", where, remedy) from error
        text = found.get("text") if isinstance(found, dict) else None
        if not isinstance(text, str):
            has = f" (it has {keys_of(found)})" if isinstance(found, dict) else ""
            remedy = f'must be a JSON object with its text as a string, {{"text": "..."}}{has}.'
            raise ConfigError("data.path", where, remedy)
        try:
            document = text.encode()
        except UnicodeEncodeError as error:
            raise _not_utf8(f"{where}, character {error.start} of its text") from error
        if document:
            yield document


def _not_utf8(where: str) -> ConfigError:
    return ConfigError(
        "data.path", where, "is not UTF-8: convert the file to UTF-8, or take it out of data.path."
    )
