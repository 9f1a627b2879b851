"""Miniature files of the Long Range Arena's archive."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return root


def article(i: int) -> bytes:
    """As in the archive: a title between blank lines, sections, and lines of the form of a title inside paragraphs."""
    body = (
        " = First line = \n Senjō no Valkyria {0} ( Japanese : 戦場のヴァルキュリア )\n"
        " = Position ; GP = \n = Last line = \n"
    )
    return f" = Title {i} = \n \n{body.format(i)} \n = = Section = = \n \n = = = Part = = = \n \n Text .\n \n \n".encode()


ARTICLES = {
    "train": [b" \n" + article(0), *map(article, range(1, 40)), b" = A = B = \n \n end"],
    "validation": [b" \n" + article(50), article(51)],
    "test": [article(60)],
}

RAW = {
    f"wikitext-103-raw/wiki.{name}.raw": b"".join(ARTICLES[split])
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
}

ZIP = "wikitext-103-raw-v1.zip"


def write_zip(root: Path, files: dict[str, bytes] = RAW) -> Path:
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root


PAIRS = {
    "train": [
        (i % 3 == 0, f'b"paper {i}\'s \\n text"'.encode(), f'"quoted ""{i}"" '.encode())
        for i in range(50)
    ],
    "validation": [(True, b"a", "Zoë\xa0".encode()), (False, b"\xff\x00", b"x" * 200_000)],
    "test": [(False, b"c", b"d")],
}


def tsv(pairs: list[tuple[bool, bytes, bytes]], end: bytes = b"\n") -> bytes:
    labels = {True: [b"1.0", b"1"], False: [b"0.0", b"0"]}
    return b"".join(
        b"\t".join([labels[label][i % 2], b"P00-1%d" % i, b"P01-1%d" % i, one, two]) + end
        for i, (label, one, two) in enumerate(pairs)
    )


TSV = {
    f"new_aan_pairs.{name}.tsv": tsv(PAIRS[split])
    for split, name in (("train", "train"), ("validation", "eval"), ("test", "test"))
}
