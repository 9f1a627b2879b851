"""WikiText-103 (Merity et al., 2016, arXiv:1609.07843), raw: articles byte for byte."""

import codecs
import io
import itertools
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from uoe_jax.data.examples import Documents
from uoe_jax.data.prepared import RawFiles, changed, digest_of, lines, manual_dir, readable
from uoe_jax.errors import ConfigError

VERSION = "1.0.0"  # of the rules below: raise it when the articles or their order change
ARCHIVE = "wikitext-103-raw-v1.zip"
ARCHIVE_BYTES = 191_984_949
FOLDER = "wikitext-103-raw"
MEMBERS = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}


def open_wikitext103(path: str, cache_dir: Path) -> Documents:
    """The articles of the archive in the directory `path`, or of its unpacked files there.

    Those of a split put together are its file (the paper counts 28,475, 60 and 60).
    """
    origin, raw = _locate(path), RawFiles(cache_dir)
    is_archive = origin.is_file()
    folder = f"{FOLDER}/" if is_archive else ""
    names = {split: folder + member for split, member in MEMBERS.items()}
    files = {split: origin / name for split, name in names.items()}
    if is_archive:
        with readable(origin):
            try:
                with zipfile.ZipFile(origin) as archive:
                    sizes = {info.filename: info.file_size for info in archive.infolist()}
            except zipfile.BadZipFile as error:
                raise _broken(origin, f"no whole zip archive ({error})") from error
    else:
        sizes = {file.name: file.stat().st_size for file in files.values() if file.is_file()}
    for name in names.values():
        if name not in sizes:
            raise _broken(origin, f"without {name}")
        if not sizes[name]:
            raise _broken(origin, f"without text in {Path(name).name}")
    if is_archive:
        (sha256,) = raw.sha256([origin])
    else:
        hashes, sha256 = raw.hashes(files)

    def documents(split: str) -> Iterator[bytes]:
        if is_archive:
            yield from _articles(origin, _from_archive(origin, sha256, names[split]))
        else:
            with raw.open(files[split], hashes[split]) as reader:
                yield from _articles(origin, lines(reader, files[split]))

    n_bytes = {split: sizes[name] for split, name in names.items()}
    facts = {"directory": str(origin.resolve()), "sha256": sha256, "n_bytes": n_bytes}
    return Documents(f"wikitext103-{VERSION}-{sha256[:24]}", documents, facts)


def _from_archive(archive: Path, sha256: str, name: str) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a member."""
    with readable(archive), open(archive, "rb") as file:
        if digest_of(file) != sha256:
            raise changed(archive)
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as opened, opened.open(name) as text:
                assert isinstance(text, zipfile.ZipExtFile)  # opened for reading
                reader = io.BufferedReader(text, 1 << 20)  # zipfile's own readline is slow
                yield from lines(reader, archive / name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            # RuntimeError: encrypted.
            raise _broken(archive, f"damaged in {name} ({error})") from error


def _articles(origin: Path, text: Iterable[tuple[int, bytes]]) -> Iterator[bytes]:
    """Cuts numbered lines at each title but the first; what precedes that belongs to it.

    A title is a line ` = Title = ` (sections have `= =`) between two blank lines: the training text
    has hundreds of lines of that form, from tables and formulas, in the middle of a paragraph.
    """
    article: list[bytes] = []
    titled, blank_before = False, True
    for (number, line), (_, after) in itertools.pairwise(itertools.chain(text, [(0, b"")])):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            raise _broken(origin, "changed, with a byte-order mark at the head of a file")
        bare = line.strip()
        is_title = bare.startswith(b"= ") and bare.endswith(b" =") and len(bare) > 4
        if is_title and bare[2:4] != b"= " and blank_before and not after.strip():
            if titled:
                yield b"".join(article)
                article = []
            titled = True
        article.append(line)
        blank_before = not bare
    if not titled:
        raise _broken(origin, "without a line ' = Title = ' in one of its files")
    yield b"".join(article)


def _locate(path: str) -> Path:
    """The archive, or the directory of the unpacked files."""
    root = manual_dir(path)
    found = [file for file in (root, root / ARCHIVE) if file.is_file()]
    found += [f for f in (root, root / FOLDER) if any((f / m).exists() for m in MEMBERS.values())]
    if found:
        return found[0]
    remedy = (
        f"download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes, from wikitext.smerity.com; not "
        "wikitext-103-v1.zip, which has <unk> for rare words), put it into "
        f"{root} as it is or unpacked, and set data.path to that directory."
    )
    raise ConfigError("data.path", path, f"neither {ARCHIVE} nor {FOLDER}/ is in {root}: {remedy}")


def _broken(origin: Path, what: str) -> ConfigError:
    remedy = f"download {ARCHIVE} ({ARCHIVE_BYTES:,} bytes) again."
    return ConfigError("data.path", str(origin), f"is {what}: {remedy}")
