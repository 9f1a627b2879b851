"""WikiText-103 (Merity et al., 2016, arXiv:1609.07843), raw: articles byte for byte (data.source='wikitext103')."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import io
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uoe_jax.data.prepared import (
    Documents,
    RawFiles,
    changed,
    dataset_directory,
    digest_of,
    lines,
    manual_dir,
    readable,
    record_counts,
)
from uoe_jax.errors import ConfigError

VERSION = "1.0.0"  # of the rules below: raise it when the articles or their order change, or caches go stale
ARCHIVE = "wikitext-103-raw-v1.zip"
ARCHIVE_BYTES = 191_984_949
FOLDER = "wikitext-103-raw"
MEMBERS = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}

Content = tuple[str, dict[str, int], Mapping[str, Callable[[], Iterator[bytes]]]]


@dataclasses.dataclass(frozen=True)
class WikiText:
    """The prepared articles, in the order of the files; those of a split put together are its file.

    Attributes:
      key: names this content under these rules; caches derived from it are keyed by it.
      directory: the tfds directory, for `tfds.builder_from_directory`.
      origin: the archive, or the directory of the unpacked files.
      sha256: of the archive, or over the hashes of the unpacked files.
      n_articles, n_bytes: per split (the paper counts 28,475, 60 and 60 articles).
    """

    key: str
    directory: Path
    origin: Path
    sha256: str
    n_articles: dict[str, int]
    n_bytes: dict[str, int]

    def documents(self, split: str) -> Documents:
        """The split's articles (imports tfds). Raises UserError where the prepared files are damaged."""
        return Documents(self.directory, split, self.n_articles[split])

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        kept = {name: getattr(self, name) for name in ("sha256", "n_articles", "n_bytes")}
        return {"directory": str(self.origin), **kept}


def open_wikitext103(path: str, cache_dir: Path) -> WikiText:
    """Prepares the articles once, from the archive in the directory `path` or from its unpacked files there.

    An empty path is the place where tfds wants what was downloaded by hand. Raises ConfigError where nothing is there or
    something is missing in it, UserError where it cannot be read.
    """
    origin = _locate(path)
    sha256, n_bytes, texts = (_packed if origin.is_file() else _unpacked)(
        origin, RawFiles(cache_dir)
    )
    for split, member in MEMBERS.items():
        if not n_bytes[split]:
            raise _broken(origin, f"without text in {member}")
    key = f"wikitext103-{VERSION}-{sha256[:24]}"
    splits = {split: functools.partial(_records, text, origin) for split, text in texts.items()}
    directory = dataset_directory(
        cache_dir, key, "wikitext103_raw", VERSION, {"text": bytes}, splits
    )
    return WikiText(key, directory, origin.resolve(), sha256, record_counts(directory), n_bytes)


def articles(text: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts lines into articles before each title but the first; what precedes that belongs to its article.

    A title is a line `= Title =` with a space around it (sections have `= =`) between two blank lines: the training text has
    hundreds of lines of that form, from tables and formulas, in the middle of a paragraph. Yields nothing where there is no
    title.
    """
    article: list[bytes] = []
    titled = False
    blank_before = True
    for line, after in itertools.pairwise(itertools.chain(text, [b""])):
        words = line.strip()
        is_title = (
            words.startswith(b"= ")
            and words.endswith(b" =")
            and len(words) > 4
            and words[2:4] != b"= "
        )
        if is_title and blank_before and not after.strip():
            if titled:
                yield b"".join(article)
                article = []
            titled = True
        article.append(line)
        blank_before = not words
    if titled:
        yield b"".join(article)


def _locate(path: str) -> Path:
    """The archive, or the directory of the unpacked files."""
    root = manual_dir(path)
    if root.is_file():
        return root
    if (root / ARCHIVE).is_file():
        return root / ARCHIVE
    for folder in (root, root / FOLDER):
        if any((folder / member).exists() for member in MEMBERS.values()):
            return folder
    remedy = (
        f"download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes, from wikitext.smerity.com; not wikitext-103-v1.zip, which has <unk> "
        f"for rare words), put it into {root} as it is or unpacked, and set data.path to that directory."
    )
    raise ConfigError("data.path", path, f"neither {ARCHIVE} nor {FOLDER}/ is in {root}: {remedy}")


def _packed(archive: Path, raw: RawFiles) -> Content:
    (sha256,) = raw.sha256([archive])
    with readable(archive):
        try:
            with zipfile.ZipFile(archive) as found:
                sizes = {info.filename: info.file_size for info in found.infolist()}
        except zipfile.BadZipFile as error:
            raise _broken(archive, f"no whole zip archive ({error})") from error
    names = {split: f"{FOLDER}/{member}" for split, member in MEMBERS.items()}
    for name in names.values():
        if name not in sizes:
            raise _broken(archive, f"without {name}")
    texts = {
        split: functools.partial(_from_archive, archive, sha256, name)
        for split, name in names.items()
    }
    return sha256, {split: sizes[name] for split, name in names.items()}, texts


def _from_archive(archive: Path, sha256: str, name: str) -> Iterator[bytes]:
    with readable(archive), open(archive, "rb") as file:
        if digest_of(file) != sha256:
            raise changed(archive)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as opened, opened.open(name) as text:
                assert isinstance(text, zipfile.ZipExtFile)  # what is opened for reading
                for _, line in lines(
                    io.BufferedReader(text, 1 << 20), archive / name
                ):  # zipfile's own readline is slow
                    yield line
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            RuntimeError,
        ) as error:  # the last: encrypted
            raise _broken(archive, f"damaged in {name} ({error})") from error


def _unpacked(folder: Path, raw: RawFiles) -> Content:
    files = {split: folder / member for split, member in MEMBERS.items()}
    for file in files.values():
        if not file.is_file():
            raise _broken(folder, f"without {file.name}")
    hashes = dict(zip(files, raw.sha256(list(files.values())), strict=True))
    sha256 = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    texts = {
        split: functools.partial(_from_file, file, hashes[split], raw)
        for split, file in files.items()
    }
    return sha256, {split: file.stat().st_size for split, file in files.items()}, texts


def _from_file(file: Path, sha256: str, raw: RawFiles) -> Iterator[bytes]:
    with raw.open(file, sha256) as reader:
        for _, line in lines(reader, file):
            yield line


def _records(text: Callable[[], Iterator[bytes]], origin: Path) -> Iterator[dict[str, bytes]]:
    n_articles = 0
    for n_articles, article in enumerate(articles(text()), 1):
        if n_articles == 1 and article.startswith(codecs.BOM_UTF8):
            raise _broken(origin, "changed, with a byte-order mark at the head of a file")
        yield {"text": article}
    if not n_articles:
        raise _broken(origin, "without a line ' = Title = ' in one of its files")


def _broken(origin: Path, what: str) -> ConfigError:
    return ConfigError(
        "data.path", str(origin), f"is {what}: download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes) again."
    )
