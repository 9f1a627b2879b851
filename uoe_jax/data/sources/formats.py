"""The format of a file of text: by its first bytes, and by its name where they leave it open.

Text is UTF-8, as it is or gzipped. Other formats are recognised to refuse them by name.
"""

import codecs
import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from uoe_jax.data.prepared import LINE_BYTES, Reader, readable, refuse
from uoe_jax.errors import ConfigError

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


def unpacked(file: BinaryIO, packed: bool) -> Any:
    """The file as a `Reader`."""
    return gzip.GzipFile(fileobj=file) if packed else file


def look(file: Path) -> tuple[bool, bool, bool]:
    """How a file of text is read: (packed by gzip, as JSON lines, behind a byte-order mark).

    Raises UserError where it is unreadable, of another format, or JSON without the key "text".
    """
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
