"""A tokenised split on disk: one flat memory-mapped array of ids, and where each document starts in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from uoe_jax.data.tokenizers.hf import LibraryTokenizer
from uoe_jax.data.tokenizers.load import Tokenizer
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import RunError

log = logging.getLogger(__name__)

FORMAT = 1
CHECKED_BYTES = (
    256 << 20
)  # above this, opening trusts the sizes and does not read every byte for the checksum


class DamagedStore(Exception):
    """The files of a store are not what its store.json says; `open_or_build` builds it again."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents as token ids, without separators.

    Attributes:
      tokens_T: the ids of all documents one after another, in the smallest unsigned type; memory-mapped.
      offsets: int64 [n_docs + 1]; document d is tokens_T[offsets[d]:offsets[d + 1]].
      bytes_E: uint16 [n_tokens + n_docs], bytes of the document that each token stands for, and behind those of a document
        the bytes that its separator stands for; None where the tokenizer knows them by token. Memory-mapped.
      bytes_unknown: why the tokens of some document do not add up to its bytes; "" where they do.
    The arrays are read-only.
    """

    tokens_T: np.ndarray
    offsets: np.ndarray
    bytes_E: np.ndarray | None = None
    bytes_unknown: str = ""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, d: int) -> np.ndarray:
        """The ids of document d, a view."""
        if not 0 <= d < len(self):
            raise IndexError(f"document {d} of {len(self)}")
        return self.tokens_T[self.offsets[d] : self.offsets[d + 1]]

    @classmethod
    def open(cls, directory: Path) -> TokenStore:
        """Opens a store. Raises DamagedStore where a file is missing, cut short or altered."""
        try:
            meta = json.loads((directory / "store.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise DamagedStore(f"format {meta['format']}, this version reads {FORMAT}")
            for name, size in meta["sizes"].items():
                if (found := (directory / name).stat().st_size) != size:
                    raise DamagedStore(f"{name} has {found} bytes where {size} were written")
            offsets = np.load(directory / "offsets.npy")
            # An array without elements cannot be memory-mapped.
            tokens_T = np.load(
                directory / "tokens.npy", mmap_mode="r" if meta["n_tokens"] else None
            )
            bytes_E = None
            if "bytes_crc" in meta:
                bytes_E = np.load(
                    directory / "bytes.npy", mmap_mode="r" if meta["n_documents"] else None
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise DamagedStore(f"{type(error).__name__}: {error}") from error
        if zlib.crc32(offsets.data) != meta["offsets_crc"]:
            raise DamagedStore("offsets.npy does not have the checksum it was written with")
        mapped = []
        for name, values in (("tokens", tokens_T), ("bytes", bytes_E)):
            if values is None:
                continue
            if values.nbytes <= CHECKED_BYTES and zlib.crc32(values.data) != meta[f"{name}_crc"]:
                raise DamagedStore(f"{name}.npy does not have the checksum it was written with")
            # A plain view of the mapping: slicing np.memmap itself costs microseconds in __array_finalize__.
            mapped.append(values.view(np.ndarray))
        for values in (*mapped, offsets):
            values.flags.writeable = False
        return cls(
            mapped[0],
            offsets,
            mapped[1] if len(mapped) > 1 else None,
            meta.get("bytes_unknown", ""),
        )

    @staticmethod
    def write(documents: Iterable[str | bytes], tokenizer: Tokenizer, directory: Path) -> None:
        """Tokenises document by document into `directory`, which must exist; store.json is written last."""
        ends = array("q", [0])  # eight bytes a document, where a list of ints takes forty
        unknown = ""
        with contextlib.ExitStack() as stack:
            dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
            tokens = stack.enter_context(_Growing(directory / "tokens.npy", dtype))
            sizes = None
            if isinstance(tokenizer, LibraryTokenizer):
                sizes = stack.enter_context(_Growing(directory / "bytes.npy", np.dtype(np.uint16)))
            for document in ticking(documents):
                if sizes is not None and isinstance(tokenizer, LibraryTokenizer):
                    ids, of_each = tokenizer.encode_with_bytes(document)
                    sizes.append(of_each)
                    unknown = unknown or _left_over(len(ends) - 1, document, of_each)
                else:
                    ids = tokenizer.encode(document)
                tokens.append(ids)
                ends.append(ends[-1] + len(ids))
        offsets = np.frombuffer(ends, np.int64)
        np.save(directory / "offsets.npy", offsets)
        names = ("tokens.npy", "offsets.npy", *(["bytes.npy"] * (sizes is not None)))
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "n_documents": len(offsets) - 1,
            "n_tokens": ends[-1],
            "tokens_crc": tokens.crc,
            "offsets_crc": zlib.crc32(offsets.data),
            "sizes": {name: (directory / name).stat().st_size for name in names},
            **({} if sizes is None else {"bytes_crc": sizes.crc, "bytes_unknown": unknown}),
        }
        (directory / "store.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _Growing:
    """A one-dimensional .npy file that grows; crc: of its elements."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file, self._dtype = open(path, "wb"), dtype
        self._length, self.crc = 0, 0
        self._start = self._write_header()

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self.crc = zlib.crc32(values.data, self.crc)
        self._length += len(values)

    def _write_header(self) -> int:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            # numpy pads headers for exactly this: an axis that grew
            if kind is None and (end := self._write_header()) != self._start:
                raise AssertionError(f"the .npy header grew from {self._start} to {end} bytes")


def _left_over(d: int, document: str | bytes, sizes: np.ndarray) -> str:
    """That the tokens of document d do not stand for all of its bytes; "" where they do."""
    n = len(document.encode("utf-8", "surrogateescape") if isinstance(document, str) else document)
    found = int(sizes.sum(dtype=np.int64))
    return "" if found == n else f"the tokens of document {d} stand for {found} of its {n} bytes"


def open_or_build(
    documents: Callable[[], Iterable[str | bytes]],
    tokenizer: Tokenizer,
    cache_dir: Path,
    key: str,
    split: str,
) -> TokenStore:
    """The store of one split from the cache, or built into it.

    Args:
      documents: called only where the store must be built.
      key: names the source's content; with the tokenizer's fingerprint and the split it names the store.

    Any number of processes may do this at once: each builds beside the final directory and renames; the first one wins.
    Raises RunError where the cache cannot be written, or where what was written does not read back.
    """
    sized = (
        "-sized" if isinstance(tokenizer, LibraryTokenizer) else ""
    )  # earlier versions kept no bytes.npy
    home = Path(cache_dir) / "tokens" / f"{key}-{tokenizer.fingerprint}{sized}-{split}"
    if home.is_dir():
        try:
            return TokenStore.open(home)
        except DamagedStore as error:
            log.warning("%s: damaged (%s); it is built again", home, error)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        try:
            new = work / "new"
            new.mkdir()
            TokenStore.write(documents(), tokenizer, new)
            store = TokenStore.open(
                new
            )  # before the rename: the mapping stays ours whatever happens to the name
            _install(new, home, aside=work / "old")
            return store
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, DamagedStore) as error:
        raise RunError(
            f"{home}: cannot write the tokenised data ({error}): free space there or set UOE_CACHE elsewhere."
        ) from error


def _install(new: Path, home: Path, aside: Path) -> None:
    """Renames `new` to `home`, unless another process put a good store there first; moves a damaged one to `aside`."""
    if home.is_dir():
        try:
            TokenStore.open(home)
            return
        except DamagedStore:
            with contextlib.suppress(FileNotFoundError):  # another process moved it first
                os.rename(home, aside)
    try:
        os.rename(new, home)
    except OSError:
        if not home.is_dir():  # else another process was first, and its store is the same as ours
            raise
