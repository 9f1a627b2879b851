"""The Python standard library's sources as a TensorFlow Datasets dataset: always there."""

import codecs
import functools
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from uoe_jax.data.examples import SPLITS, Documents
from uoe_jax.data.prepared import changed, dataset_directory, open_records, readable
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError
from uoe_jax.runtime_env import expanded

VERSION = "1.0.0"  # of the rules below: raise it when choice, split or order of files change
_EXCLUDED = "test tests idle_test idlelib turtledemo site-packages dist-packages _bundled"
EXCLUDED = frozenset([*_EXCLUDED.split(), "__pycache__"])
# Written when an interpreter is built or packaged: without them, equal releases have equal sources.
EXCLUDED_PREFIXES = (".", "_sysconfigdata", "config-", "sitecustomize")


class SourceFile(NamedTuple):
    """A file and its bytes on disk."""

    relative: str  # POSIX path below the directory
    size: int
    sha256: str
    bom: bool = False  # begins with a byte-order mark, which is no part of its document

    @property
    def path_hash(self) -> bytes:
        return hashlib.sha256(os.fsencode(self.relative)).digest()

    @property
    def split(self) -> str:
        """About 90/5/5 by the path alone: an edit or a new file moves no other file."""
        percent = int.from_bytes(self.path_hash[:8], "big") % 100
        return "train" if percent < 90 else "validation" if percent < 95 else "test"


def open_stdlib(path: str, cache_dir: Path) -> Documents:
    """Prepares the .py files under `path` (empty: this interpreter's standard library) once.

    The key is a hash of the content (some 50 ms for 11 MB): an edited source is prepared anew.
    """
    root = Path(expanded(path, "config.data.path")) if path else Path(sysconfig.get_path("stdlib"))
    files = scan(root, path)
    marks = {True: "\0bom\n", False: "\n"}
    lines = "".join(f"{file.relative}\0{file.sha256}{marks[file.bom]}" for file in files)
    sha256 = hashlib.sha256(os.fsencode(lines)).hexdigest()
    by_split = {split: [file for file in files if file.split == split] for split in SPLITS}
    for split, found in by_split.items():
        if not found:
            empty = f"its {len(files)} .py files leave the {split} split empty"
            rule = "files go to train/validation/test by a hash of their path, about 90/5/5"
            remedy = f"{empty} ({rule}): name a directory with more files."
            raise ConfigError("data.path", path or str(root), remedy)
    key = f"stdlib-{VERSION}-{sha256[:24]}"
    fields = {"path": bytes, "text": bytes}
    splits = {s: functools.partial(_records, root, found) for s, found in by_split.items()}
    home = dataset_directory(cache_dir, key, "python_sources", VERSION, fields, splits)

    def documents(split: str) -> Iterator[bytes]:
        return (record["text"] for record in open_records(home, split, len(by_split[split])))

    facts = {
        "directory": str(root.resolve()),
        "python_version": None if path else platform.python_version(),
        "sha256": sha256,
        "n_files": {split: len(found) for split, found in by_split.items()},
        "n_bytes": {split: sum(file.size for file in found) for split, found in by_split.items()},
    }
    return Documents(key, documents, facts)


def scan(root: Path, path: str = "") -> list[SourceFile]:
    """The .py files under `root` in path order; `path` is data.path as written, for the error."""
    files, problem = [], "holds no .py file"
    try:
        files = sorted(_python_files(root), key=lambda file: os.fsencode(file.relative))
    except OSError as error:
        problem = f"cannot read {error.filename}: {error.strerror}"
    if not files:
        default = "" if path else " This Python ships without its library's sources;"
        remedy = f"{problem}.{default} set data.path to a directory of .py files."
        raise ConfigError("data.path", path or str(root), remedy)
    return files


def _python_files(root: Path) -> Iterator[SourceFile]:
    def kept(name: str) -> bool:
        return name not in EXCLUDED and not name.startswith(EXCLUDED_PREFIXES)

    def failed(error: OSError) -> NoReturn:
        raise error

    for folder, names, leaves in os.walk(root, onerror=failed):
        names[:] = filter(kept, names)  # prunes the walk
        for leaf in ticking(filter(kept, leaves)):
            file = Path(folder, leaf)
            if file.suffix.lower() == ".py" and file.is_file():
                data = file.read_bytes()
                sha256, bom = hashlib.sha256(data).hexdigest(), data.startswith(codecs.BOM_UTF8)
                yield SourceFile(file.relative_to(root).as_posix(), len(data), sha256, bom)


def _records(root: Path, files: list[SourceFile]) -> Iterator[dict[str, bytes]]:
    # In the order of the path's hash neighbours are unrelated, and a prefix of a split is a sample.
    for file in sorted(files, key=lambda file: file.path_hash):
        with readable(root / file.relative):
            data = (root / file.relative).read_bytes()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise changed(root / file.relative)
        yield {"path": os.fsencode(file.relative), "text": data.removeprefix(codecs.BOM_UTF8)}
