"""The user's own text: files of plain text or JSON lines, read as a stream and never whole.

Text is UTF-8, as it is or gzipped. The format of a file shows in its first bytes, and in its name
where they leave it open; others than text are recognised to refuse them by name.
"""

import codecs
import fnmatch
import functools
import glob
import gzip
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from uoe_jax.data.examples import Documents
from uoe_jax.data.prepared import LINE_BYTES, RawFiles, Reader, lines, readable, refuse
from uoe_jax.distributed import coordination
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError
from uoe_jax.runtime_env import expanded, notice

VERSION = "1.0.0"  # of the rules below: raise it when documents, their split or order change
DOCUMENT_BYTES = 64 << 10
TAKEN = (".txt", ".jsonl", ".ndjson")  # of a directory, in any case, each also with .gz
SHOWN = 3  # names of skipped files
BOM = codecs.BOM_UTF8
HEAD_BYTES = 4096
JSON_LINES = (".jsonl", ".ndjson", ".json")
_NO_WORD = rb"(?![\s!-/:-@])"  # behind a mark of letters, which may begin a text, too
_OTHERS = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32"),  # before UTF-16, whose mark it begins with
    (rb"\xff\xfe|\xfe\xff", "UTF-16"),
    (rb"\x1f\x8b", "gzip"),
    (rb"PAR1" + _NO_WORD, "Parquet"),
    (rb"ARROW1" + _NO_WORD + rb"|\xff\xff\xff\xff", "Arrow"),
    (rb"FEA1" + _NO_WORD, "Feather"),
    (rb"Obj\x01", "Avro"),
    (rb"SQLite format 3\0", "SQLite"),
    (rb"\x89HDF\r\n", "HDF5"),
    (rb"\x93NUMPY", "NumPy"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstandard"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x04\x22\x4d\x18", "lz4"),
    (rb"\xff\x06\0\0sNaPpY", "snappy"),
    (rb"\x1f\x9d", "compress"),
    (rb"PK(\x03\x04|\x05\x06)", "zip"),
    (rb"7z\xbc\xaf\x27\x1c", "7z"),
    (rb"Rar!\x1a\x07", "rar"),
    (rb".{257}ustar", "tar"),
    (rb"%PDF-", "PDF"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Microsoft Office"),
    (rb"\x89PNG", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x7fELF", "ELF"),
)


class TextFile(NamedTuple):
    """A file and how it is read (`look`)."""

    path: Path
    sha256: str  # of its bytes on disk
    packed: bool
    json_lines: bool
    bom: bool

    @property
    def content(self) -> tuple[str | bool, ...]:
        """All that its documents depend on."""
        return self.sha256, self.packed, self.json_lines, *(["bom"] if self.bom else [])


def open_text(path: str, cache_dir: Path, held_out: int = 1, quiet: bool = False) -> Documents:
    """The text of a directory (.txt, .jsonl and .ndjson, also .gz, at any depth) or of a glob.

    A line of JSON lines is a document: its field "text", of any length; empty ones are skipped. Any
    other file is text: one document, or several of at most 64 KiB, cut at the ends of lines (inside
    a longer line, between two characters). A byte-order mark at the head of a file is dropped.

    The hash of a document's bytes decides its split: equal documents are in one split, and added
    files move no document. About `held_out` percent are for validation, and as many for test. Files
    are read in the order of their hashes: names do not matter.

    In a glob, `**` is any depth, and .json is JSON lines too. Hidden files are skipped; so are
    other files of a directory, which process 0 prints unless `quiet`.
    """
    sizes, skipped = find(path)
    full = [file for file, size in sizes.items() if size]
    if not full:
        remedy = f"its {len(sizes)} files are all empty: name files with text."
        raise ConfigError("data.path", path, remedy)
    formats = [look(file) for file in ticking(full)]
    if skipped and not quiet and os.environ.get(coordination.PROCESS_ID, "0") in ("", "0"):
        count = f"{len(skipped)} of {len(skipped) + len(sizes)} files skipped ({_few(skipped)})"
        read = ".txt, .jsonl and .ndjson are read, also gzipped; name others by a glob"
        notice(f"data.path={path}: {count}; {read}")
    raw = RawFiles(cache_dir)
    named = zip(full, raw.sha256(full), formats)
    found = [TextFile(file, sha256, *how) for file, sha256, how in named]
    files = sorted(found, key=lambda file: file.content)
    sha256 = hashlib.sha256(json.dumps([file.content for file in files]).encode()).hexdigest()
    facts = {
        "path": path,
        "sha256": sha256,
        "n_files": len(files),
        "n_bytes": sum(sizes.values()),
        "n_empty_files": len(sizes) - len(full),
        "n_passed_over": len(skipped),
    }
    key = f"text-{VERSION}-{sha256[:24]}" + (f"-{held_out}" if held_out != 1 else "")
    return Documents(key, functools.partial(_of_split, path, files, raw, held_out), facts)


def _of_split(
    path: str, files: Sequence[TextFile], raw: RawFiles, held_out: int, split: str
) -> Iterator[bytes]:
    n_documents = n_yielded = 0
    for file in files:
        for document in read_text(file, raw):
            n_documents += 1
            if split_of(document, held_out) == split:
                n_yielded += 1
                yield document
    if not n_documents:
        raise ConfigError("data.path", path, f"its {len(files)} files hold no text: name others.")
    if not n_yielded:
        remedy = (
            f"its {n_documents} documents leave the {split} split empty (a document goes to "
            "train/validation/test by a hash of its content, "
            f"{100 - 2 * held_out}/{held_out}/{held_out}; a text file is one document per 64 KiB): "
            "add files, cut long ones, or raise data.held_out."
        )
        raise ConfigError("data.path", path, remedy)


def split_of(document: bytes, held_out: int = 1) -> str:
    """The split of a document by the hash of its bytes; held_out: in percent, of each split."""
    rest = 100 - int.from_bytes(hashlib.sha256(document).digest()[:8], "big") % 100
    return "train" if rest > 2 * held_out else "validation" if rest > held_out else "test"


def find(path: str) -> tuple[dict[Path, int], list[str]]:
    """({file: size} of what data.path names, ordered by name; its directory's other files)."""
    if not path:
        remedy = "set it to a directory of .txt or .jsonl files, or a glob such as 'DIR/**/*.txt'."
        raise ConfigError("data.path", path, remedy)
    pattern = expanded(path, "config.data.path")
    names: list[str] = []
    others: list[str] = []
    if os.path.isdir(pattern):
        for name in _walk(pattern):
            if name.lower().removesuffix(".gz").endswith(TAKEN):
                names.append(name)
            elif os.path.isfile(name):
                others.append(os.path.relpath(name, pattern))
        others.sort()
        there = f" but {len(others)} other files ({_few(others)})" if others else ""
        none = f"holds no .txt, .jsonl or .ndjson file (also .gz){there}"
        missing = f"{none}: name a directory that does, or others by a glob."
    else:
        head, rest = _head(pattern)
        if "**" in rest:  # glob itself skips directories that cannot be read
            list(_walk(os.path.join(".", head)))
        whole = os.path.join(glob.escape(head), rest)
        names = [pattern] if os.path.exists(pattern) else glob.glob(whole, recursive=True)
        missing = "is neither a directory nor a glob of files here: name one of text or JSON lines."
    files: dict[str, tuple[Path, int]] = {}  # each once, by its real path
    for name in ticking(sorted(names, key=os.fsencode)):
        file = Path(name)
        with readable(file):
            found = os.stat(file)
        if stat.S_ISREG(found.st_mode):
            files.setdefault(os.path.realpath(name), (file, found.st_size))
    if not files:
        raise ConfigError("data.path", path, missing)
    return dict(files.values()), others


def _few(names: list[str]) -> str:
    """The first of some names, on one line."""
    shown = [name if name.isprintable() else repr(name) for name in names[:SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > SHOWN else "")


def _head(pattern: str) -> tuple[str, str]:
    """(the directory that a glob begins with, which may be named `fold[1]`; the pattern below)."""
    parts = Path(pattern).parts
    for n, part in enumerate(parts):
        # As `*` does, which then means others as well.
        matches_itself = fnmatch.fnmatchcase(part, part)
        is_pattern = matches_itself or not os.path.isdir(os.path.join(*parts[: n + 1]))
        if glob.has_magic(part) and is_pattern:
            return os.path.join("", *parts[:n]), os.path.join(*parts[n:])
    return os.path.join("", *parts[:-1]), os.path.join("", *parts[-1:])


def _walk(root: str) -> Iterator[str]:
    """The files below, also behind links, but hidden ones. Raises UserError where unreadable."""
    seen = {os.path.realpath(root)}
    refused = lambda error: refuse(str(error.filename), error)  # noqa: E731
    for folder, folders, leaves in os.walk(root, onerror=refused, followlinks=True):
        found: dict[str, str] = {}
        for name in sorted(folders):
            if not name.startswith("."):
                found.setdefault(os.path.realpath(os.path.join(folder, name)), name)
        folders[:] = [name for real, name in found.items() if real not in seen]
        seen |= found.keys()
        for leaf in ticking(leaves):
            if not leaf.startswith("."):
                yield os.path.join(folder, leaf)


def read_text(file: TextFile, raw: RawFiles) -> Iterator[bytes]:
    """The documents of a file."""
    with raw.open(file.path, file.sha256) as opened:
        reader = unpacked(opened, file.packed)
        offset = len(reader.read(len(BOM))) if file.bom else 0
        if file.json_lines:
            yield from _from_json_lines(reader, file.path)
        else:
            yield from _from_text(reader, file.path, offset)


def _from_text(reader: Reader, file: Path, offset: int = 0) -> Iterator[bytes]:
    """offset: of the reader, in bytes."""
    rest = b""
    while rest := rest + reader.read(DOCUMENT_BYTES + 1 - len(rest)):
        end = len(rest)
        if end > DOCUMENT_BYTES:
            # Before the first byte of a character, which at most three bytes 10xxxxxx follow.
            ends = (e for e in range(DOCUMENT_BYTES, DOCUMENT_BYTES - 4, -1) if rest[e] >> 6 != 2)
            end = rest.rfind(b"\n", 0, DOCUMENT_BYTES) + 1 or next(ends, DOCUMENT_BYTES)
        document, rest = rest[:end], rest[end:]
        try:
            document.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{file}, byte {offset + error.start}") from error
        yield document
        offset += end


def _from_json_lines(reader: Reader, file: Path) -> Iterator[bytes]:
    for number, line in lines(reader, file):
        if line.isspace():
            continue
        where = f"{file}, line {number}"
        try:
            found = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{where}, byte {error.start} of the line") from error
        except (ValueError, RecursionError) as error:
            remedy = f"is no JSON of its own ({error}): fix it, or take the file out of data.path."
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
    remedy = "is not UTF-8: convert the file to UTF-8, or take it out of data.path."
    return ConfigError("data.path", where, remedy)


def unpacked(file: BinaryIO, packed: bool) -> Any:
    """The file as a `Reader`."""
    return gzip.GzipFile(fileobj=file) if packed else file


def look(file: Path) -> tuple[bool, bool, bool]:
    """How a file of text is read: (packed by gzip, as JSON lines, behind a byte-order mark)."""
    name = file.name.lower()
    bare = name.removesuffix(".gz")
    with readable(file), open(file, "rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
        opened.seek(0)
        reader = unpacked(opened, packed)
        head = reader.read(HEAD_BYTES)
        if other := other_format(head):
            raise ConfigError("data.path", str(file), f"{other}, or take it out of data.path.")
        if name != bare and not packed:
            refuse(file, ValueError("it is named .gz and is not a gzip file"))
        bom = head.startswith(BOM)
        reader.seek(len(BOM) if bom else 0)
        start = head.removeprefix(BOM).lstrip()[:1]
        json_lines, is_array = bare.endswith(JSON_LINES), start == b"[" and bare.endswith(".json")
        # Lines are only read where they may be JSON: a file may be one line of any length.
        if is_array or not json_lines and (not start or start in b"{["):
            json_lines = _are_json_lines(reader, file, is_array)
    return packed, json_lines, bom


def other_format(head: bytes) -> str | None:
    """The format of a file's first bytes, and what to do; None for UTF-8."""
    found = next((name for mark, name in _OTHERS if re.match(mark, head, re.DOTALL)), None)
    halves = head[: len(head) & ~1]
    zeros = sorted((halves[0::2].count(0), halves[1::2].count(0)))
    if found is None and len(halves) >= 4 and zeros[0] == 0 and 4 * zeros[1] > len(halves):
        found = "UTF-16"  # without its mark, of mostly Latin letters
    if found is None:
        return None
    if found.startswith("UTF-"):
        return f"is {found}: convert it to UTF-8"
    return f"holds {found}, which is not read here: convert it to text or JSON lines"


def keys_of(found: Mapping[str, Any]) -> str:
    """The keys of a JSON object, abridged, for an error."""
    if not found:
        return "no key"
    names = [repr(key if len(key) < 40 else key[:36] + "…") for key in list(found)[:8]]
    return f"the keys {', '.join(names)}" + (", …" if len(found) > 8 else "")


def json_of(text: str | bytes) -> Any:
    """The JSON value of a text, UTF-8 where it is bytes; None for what is none."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError):
        return None


def _are_json_lines(reader: Reader, file: Path, is_array: bool) -> bool:
    """Whether the lines are JSON objects with a text. Raises ConfigError for ones without."""
    pieces = iter(lambda: reader.readline(LINE_BYTES), b"")  # lines, or pieces of ones too long
    full = (piece for piece in pieces if not piece.isspace())
    line = next(full, b"")
    if is_array or line.lstrip().startswith(b"[") and _begins_with_text(line):
        remedy = "write its objects one a line (jq -c '.[]' does), or take it out of data.path."
        raise ConfigError("data.path", str(file), f"is one JSON array: {remedy}")
    first = json_of(line)
    if not isinstance(first, dict):
        return False
    line = next(full, b"")
    if isinstance(first.get("text"), str):  # else it is text that begins with an object
        return not line or line.lstrip().startswith(b"{")
    if isinstance(json_of(line), dict):
        found = f'its lines are JSON objects with {keys_of(first)} and no string "text"'
        remedy = "put each line's text there, or the whole line, or take it out of data.path."
        raise ConfigError("data.path", str(file), f"{found}: {remedy}")
    return False


def _begins_with_text(line: bytes) -> bool:
    """Whether an array on one line begins with an object with a text; over several, it is text."""
    try:
        first, _ = json.JSONDecoder().raw_decode(line.decode().lstrip()[1:].lstrip())
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("text"), str)
