"""WikiText-103 (Merity et al., 2016, arXiv:1609.07843), raw: articles byte for byte."""

from __future__ import annotations

import codecs
import dataclasses
import io
import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from uoe_jax.data.prepared import RawFiles, changed, digest_of, lines, manual_dir, readable
from uoe_jax.errors import ConfigError

VERSION = "1.0.0"  # of the rules below: raise it when the articles or their order change
ARCHIVE = "wikitext-103-raw-v1.zip"
ARCHIVE_BYTES = 191_984_949
FOLDER = "wikitext-103-raw"
MEMBERS = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}


@dataclasses.dataclass(frozen=True)
class WikiText:
    """The articles in the order of the files; those of a split put together are its file.

    Attributes:
      key: names this content under these rules; caches derived from it are keyed by it.
      origin: the archive, or the directory of the unpacked files.
      sha256: of the archive, or over `hashes`.
      hashes: of the unpacked files, per split; empty for the archive.
      n_bytes: per split.
    """

    key: str
    origin: Path
    sha256: str
    hashes: dict[str, str]
    n_bytes: dict[str, int]
    raw: RawFiles

    def documents(self, split: str) -> Iterator[bytes]:
        """The split's articles (the paper counts 28,475, 60 and 60).

        Raises:
          ConfigError: there is no article, or a byte-order mark.
          UserError: a file cannot be read, or changed since it was hashed.
        """
        n_articles = 0
        text = self._unpacked(split) if self.hashes else self._packed(split)
        for n_articles, article in enumerate(articles(text), 1):
            if n_articles == 1 and article.startswith(codecs.BOM_UTF8):
                raise _broken(self.origin, "changed, with a byte-order mark at the head of a file")
            yield article
        if not n_articles:
            raise _broken(self.origin, "without a line ' = Title = ' in one of its files")

    def _packed(self, split: str) -> Iterator[bytes]:
        name = f"{FOLDER}/{MEMBERS[split]}"
        with readable(self.origin), open(self.origin, "rb") as file:
            if digest_of(file) != self.sha256:
                raise changed(self.origin)
            file.seek(0)
            try:
                with zipfile.ZipFile(file) as archive, archive.open(name) as text:
                    assert isinstance(text, zipfile.ZipExtFile)  # opened for reading
                    reader = io.BufferedReader(text, 1 << 20)  # zipfile's own readline is slow
                    yield from (line for _, line in lines(reader, self.origin / name))
            # RuntimeError: encrypted.
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise _broken(self.origin, f"damaged in {name} ({error})") from error

    def _unpacked(self, split: str) -> Iterator[bytes]:
        file = self.origin / MEMBERS[split]
        with self.raw.open(file, self.hashes[split]) as reader:
            yield from (line for _, line in lines(reader, file))

    def record(self) -> dict[str, Any]:
        return {"directory": str(self.origin), "sha256": self.sha256, "n_bytes": self.n_bytes}


def open_wikitext103(path: str, cache_dir: Path) -> WikiText:
    """The articles of the archive in the directory `path`, or of its unpacked files there.

    An empty path is the directory in which tfds expects manual downloads.

    Raises:
      ConfigError: nothing is there, or something is missing in it.
      UserError: it cannot be read.
    """
    origin, raw = _locate(path), RawFiles(cache_dir)
    hashes: dict[str, str] = {}
    if origin.is_file():
        (sha256,) = raw.sha256([origin])
        with readable(origin):
            try:
                with zipfile.ZipFile(origin) as archive:
                    sizes = {info.filename: info.file_size for info in archive.infolist()}
            except zipfile.BadZipFile as error:
                raise _broken(origin, f"no whole zip archive ({error})") from error
        names = {split: f"{FOLDER}/{member}" for split, member in MEMBERS.items()}
    else:
        names, files = MEMBERS, {split: origin / member for split, member in MEMBERS.items()}
        sizes = {file.name: file.stat().st_size for file in files.values() if file.is_file()}
    for name in names.values():
        if name not in sizes:
            raise _broken(origin, f"without {name}")
        if not sizes[name]:
            raise _broken(origin, f"without text in {Path(name).name}")
    if not origin.is_file():
        hashes, sha256 = raw.hashes(files)
    n_bytes = {split: sizes[name] for split, name in names.items()}
    key = f"wikitext103-{VERSION}-{sha256[:24]}"
    return WikiText(key, origin.resolve(), sha256, hashes, n_bytes, raw)


def articles(text: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts lines into articles at each title but the first; what precedes that belongs to it.

    A title is a line ` = Title = ` (sections have `= =`) between two blank lines: the training text
    has hundreds of lines of that form, from tables and formulas, in the middle of a paragraph.
    Without a title there is no article.
    """
    article: list[bytes] = []
    titled = False
    blank_before = True
    for line, after in itertools.pairwise(itertools.chain(text, [b""])):
        bare = line.strip()
        is_title = bare.startswith(b"= ") and bare.endswith(b" =") and len(bare) > 4
        if is_title and bare[2:4] != b"= " and blank_before and not after.strip():
            if titled:
                yield b"".join(article)
                article = []
            titled = True
        article.append(line)
        blank_before = not bare
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
        f"download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes, from wikitext.smerity.com; not "
        "wikitext-103-v1.zip, which has <unk> for rare words), put it into "
        f"{root} as it is or unpacked, and set data.path to that directory."
    )
    raise ConfigError("data.path", path, f"neither {ARCHIVE} nor {FOLDER}/ is in {root}: {remedy}")


def _broken(origin: Path, what: str) -> ConfigError:
    remedy = f"download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes) again."
    return ConfigError("data.path", str(origin), f"is {what}: {remedy}")
