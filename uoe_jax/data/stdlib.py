"""The Python standard library's sources as a TensorFlow Datasets dataset: real text that is always there.

No TensorFlow is needed, neither to build nor to read, and tfds itself (0.4 s to import) is only imported where there
is something to build or to read: the content hash of the directory (some 50 ms for 11 MB) says whether there is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import platform
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from uoe_jax.errors import ConfigError, RunError, UserError

VERSION = "1.0.0"  # of the rules below: raise it when the choice, split or order of files changes, or caches go stale
SPLITS = ("train", "validation", "test")
EXCLUDED_DIRS = frozenset({
    "test", "tests", "idle_test", "idlelib", "turtledemo", "site-packages", "dist-packages", "__pycache__", "_bundled",
})  # fmt: skip
# Written when an interpreter is built or packaged: without them, equal releases have equal sources on all machines.
MACHINE_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


def _left_out(name: str) -> bool:
    return name in EXCLUDED_DIRS or name.startswith((".", *MACHINE_PREFIXES))


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file under the source directory: relative POSIX path, size in bytes, SHA-256 of its bytes."""

    relative: str
    size: int
    sha256: str

    @functools.cached_property
    def path_hash(self) -> bytes:
        return hashlib.sha256(os.fsencode(self.relative)).digest()

    @property
    def split(self) -> str:
        """About 90/5/5 by the path alone, so that an edited or added file moves no other file to another split."""
        percent = int.from_bytes(self.path_hash[:8], "big") % 100
        return "train" if percent < 90 else "validation" if percent < 95 else "test"


class Documents:
    """Random access to the raw bytes of one split's files, in the order of the hash of their paths."""

    def __init__(self, directory: Path, split: str, n_files: int) -> None:
        """Opens the split (imports tfds). Raises UserError where the prepared files are damaged, as reading does."""
        import tensorflow_datasets as tfds

        self._directory = directory
        try:
            self._records = tfds.builder_from_directory(str(directory)).as_data_source(split=split)
            found = len(self._records)
        except Exception as error:  # tfds, etils and array_record each raise their own
            raise self._damaged(error) from error
        if found != n_files:
            raise self._damaged(f"{found} {split} files where {n_files} were prepared")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")  # array_record's is a ValueError: no end of iteration
        try:
            return self._records[index]["text"]
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, what: object) -> UserError:
        home = self._directory.parent.parent
        return UserError(f"{home}: the prepared dataset cannot be read ({what!r}): delete it and run again.")


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """A prepared dataset on disk, and what the run's record says of it.

    Attributes:
      key: names this content under these rules; caches derived from it are keyed by it.
      directory: the tfds directory, for `tfds.builder_from_directory`.
      origin: where the files were read.
      python_version: of the running interpreter where its own library was read, else None.
      sha256: over the relative paths and bytes of all files.
      n_files, n_bytes: per split.
    """

    key: str
    directory: Path
    origin: Path
    python_version: str | None
    sha256: str
    n_files: dict[str, int]
    n_bytes: dict[str, int]

    def documents(self, split: str) -> Documents:
        """The split's files (imports tfds). Raises UserError where the prepared files are damaged."""
        return Documents(self.directory, split, self.n_files[split])

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        kept = ("python_version", "sha256", "n_files", "n_bytes")
        return {"directory": str(self.origin), **{name: getattr(self, name) for name in kept}}


def prepare(path: str, cache_dir: Path) -> PreparedSource:
    """Prepares the .py files under `path` (empty: this interpreter's standard library) once.

    The result is keyed by content, so an edited source is prepared anew and an unchanged one costs only its hash.
    Raises UserError where `path` is no readable directory, or holds too few .py files to give every split one.
    """
    root = Path(path).expanduser() if path else Path(sysconfig.get_path("stdlib"))
    files = scan(root, path)
    content = hashlib.sha256()
    for file in files:
        content.update(os.fsencode(file.relative) + b"\0" + file.sha256.encode() + b"\n")
    sha256 = content.hexdigest()
    n_files = {split: sum(file.split == split for file in files) for split in SPLITS}
    if empty := [split for split, n in n_files.items() if n == 0]:
        remedy = f"its {len(files)} .py files leave the {empty[0]} split empty (files go to train/validation/test by " \
                 "a hash of their path, about 90/5/5): name a directory with more files."  # fmt: skip
        raise ConfigError("data.path", path or str(root), remedy)

    key = f"stdlib-{VERSION}-{sha256[:24]}"
    home = Path(cache_dir) / "sources" / key
    if not home.is_dir():
        _build(root, files, home)
    return PreparedSource(
        key=key,
        directory=home / "python_sources" / VERSION,
        origin=root.resolve(),
        python_version=None if path else platform.python_version(),
        sha256=sha256,
        n_files=n_files,
        n_bytes={split: sum(file.size for file in files if file.split == split) for split in SPLITS},
    )


def scan(root: Path, path: str = "") -> list[SourceFile]:
    """The .py files under `root` in ascending path order; `path` is what the person wrote, for the error."""
    shown = path or str(root)
    default = "" if path else " This Python ships without its library's sources;"
    remedy = default + " set data.path to a directory of .py files."
    if not root.is_dir():
        raise ConfigError("data.path", shown, f"is not a directory on this machine.{remedy}")

    def refuse(error: OSError) -> NoReturn:
        raise ConfigError("data.path", shown, f"cannot read {error.filename}: {error.strerror}.{remedy}") from error

    files = []
    for folder, names, leaves in os.walk(root, onerror=refuse):
        names[:] = [name for name in names if not _left_out(name)]  # prunes the walk
        for leaf in leaves:
            file = Path(folder, leaf)
            if file.suffix != ".py" or _left_out(leaf) or not file.is_file():
                continue
            try:
                data = file.read_bytes()
            except OSError as error:
                refuse(error)
            files.append(SourceFile(file.relative_to(root).as_posix(), len(data), hashlib.sha256(data).hexdigest()))
    if not files:
        raise ConfigError("data.path", shown, f"holds no .py file.{remedy}")
    return sorted(files, key=lambda file: os.fsencode(file.relative))


def _build(root: Path, files: list[SourceFile], home: Path) -> None:
    """Builds beside `home` and renames, so that `home` is complete or absent whoever else builds it meanwhile."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        try:
            import tensorflow_datasets as tfds

            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):  # tfds prints there, and our stdout may be a JSON line
                builder = _builder_class()(root=root, files=files, data_dir=work, file_format="array_record")
                builder.download_and_prepare()
            try:
                os.rename(work, home)
            except OSError:
                if not home.is_dir():  # else another process was first, and its result is the same as ours
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{home}: cannot prepare the dataset ({error}): free space there or set UOE_CACHE elsewhere."
        ) from error


@functools.cache  # tfds refuses to register a builder name twice
def _builder_class() -> type:
    import tensorflow_datasets as tfds

    class PythonSources(tfds.core.GeneratorBasedBuilder):
        """Python source files: path and raw bytes."""

        VERSION = tfds.core.Version(VERSION)
        # Where tfds looks for download checksums: we download nothing, and its lookup imports importlib_resources,
        # which tfds 4.9.10 does not require of pip on Python 3.9 and later (etils used to bring it along).
        code_path = None

        def __init__(self, *, root: Path, files: list[SourceFile], **kwargs: Any) -> None:
            self._root = root
            self._files = files
            super().__init__(**kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            text = tfds.features.Text
            features = tfds.features.FeaturesDict({"path": text(), "text": text()})
            # Our own order (below), so that no release of tfds can change what a seed and a step mean.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in SPLITS}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, bytes]]]:
            # By the hash of the path: neighbours in a row are then unrelated, and any prefix of a split is a sample.
            chosen = sorted((file for file in self._files if file.split == split), key=lambda file: file.path_hash)
            for index, file in enumerate(chosen):
                data = (self._root / file.relative).read_bytes()
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise UserError(f"{self._root / file.relative}: changed while it was being read: run again.")
                yield index, {"path": os.fsencode(file.relative), "text": data}

    return PythonSources
