"""A tokenised split on disk: one flat memory-mapped array of ids and the start of each document."""

import contextlib
import dataclasses
import json
import logging
import os
import zlib
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import DTypeLike

from uoe_jax.data.prepared import new_directory
from uoe_jax.data.tokenizers.base import Tokenizer, as_bytes
from uoe_jax.distributed.watchdog import ticking

log = logging.getLogger(__name__)

FORMAT = 1
CHECKED_BYTES = 256 << 20  # larger arrays are opened without computing their checksum


class DamagedStore(OSError):
    """The files of a store are not what store.json says; `open_or_build` builds it again."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents as token ids, without separators. The arrays are read-only, large ones mapped."""

    tokens_T: np.ndarray  # the ids of all documents in order, in the smallest unsigned type
    offsets: np.ndarray  # int64 [n_docs + 1]; document d is tokens_T[offsets[d]:offsets[d + 1]]
    # uint16 [n_tokens + n_docs], bytes of the document per token, and after the tokens of each
    # document the bytes of its separator; None where the tokenizer has `bytes_per_token`.
    bytes_E: np.ndarray | None = None
    bytes_unknown: str = ""  # why the tokens of a document do not add up to its bytes; "": they do

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, d: int) -> np.ndarray:
        if not 0 <= d < len(self):
            raise IndexError(f"document {d} of {len(self)}")
        return self.tokens_T[self.offsets[d] : self.offsets[d + 1]]

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Opens a store. Raises DamagedStore where a file is missing, cut short or altered."""
        arrays = {}
        try:
            meta = json.loads((directory / "store.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            # Mapped, unless empty, which cannot be.
            mapped = {"tokens.npy": meta["n_tokens"], "bytes.npy": meta["n_documents"]}
            for file, size in meta["sizes"].items():
                if (found := (directory / file).stat().st_size) != size:
                    raise ValueError(f"{file} has {found} bytes where {size} were written")
                values = np.load(directory / file, mmap_mode="r" if mapped.get(file) else None)
                name = file.removesuffix(".npy")
                checked = values.nbytes <= CHECKED_BYTES or name == "offsets"
                if checked and zlib.crc32(values.data) != meta[f"{name}_crc"]:
                    raise ValueError(f"{file} does not have the checksum it was written with")
                # A plain view: slicing np.memmap costs microseconds in __array_finalize__.
                arrays[name] = values.view(np.ndarray)
                arrays[name].flags.writeable = False
            unknown = meta.get("bytes_unknown", "")
            return cls(arrays["tokens"], arrays["offsets"], arrays.get("bytes"), unknown)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise DamagedStore(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def write(documents: Iterable[str | bytes], tokenizer: Tokenizer, directory: Path) -> None:
        """Tokenises into `directory`, which must exist; store.json is written last."""
        offsets = array("q", [0])  # eight bytes a document, where a list of ints takes forty
        unknown, arrays = "", {}
        dtypes: dict[str, DTypeLike] = {
            "tokens": np.min_scalar_type(tokenizer.vocab_size - 1),
            "offsets": np.int64,
        }
        if tokenizer.bytes_per_token is None:
            dtypes["bytes"] = np.uint16
        with contextlib.ExitStack() as stack:
            for name, dtype in dtypes.items():
                growing = contextlib.closing(_GrowingArray(directory / f"{name}.npy", dtype))
                arrays[name] = stack.enter_context(growing)
            for d, document in enumerate(ticking(documents)):
                if "bytes" not in arrays:
                    ids = tokenizer.encode(document)
                else:
                    ids, sizes_E = tokenizer.encode_with_bytes(document)
                    arrays["bytes"].append(sizes_E)
                    n, found = len(as_bytes(document)), int(sizes_E.sum(dtype=np.int64))
                    if found != n and not unknown:
                        unknown = f"the tokens of document {d} stand for {found} of its {n} bytes"
                arrays["tokens"].append(ids)
                offsets.append(offsets[-1] + len(ids))
            arrays["offsets"].append(np.frombuffer(offsets, np.int64))
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "n_documents": len(offsets) - 1,
            "n_tokens": offsets[-1],
            "sizes": {f"{n}.npy": (directory / f"{n}.npy").stat().st_size for n in arrays},
            **{f"{name}_crc": written.crc for name, written in arrays.items()},
            "bytes_unknown": unknown,
        }
        (directory / "store.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


class _GrowingArray:
    """A one-dimensional .npy file that is appended to; crc: of its elements."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._file, self._dtype = open(path, "wb"), np.dtype(dtype)
        self._length = self.crc = 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self.crc = zlib.crc32(values.data, self.crc)
        self._length += len(values)

    def close(self) -> None:
        with self._file:
            self._write_header()

    def _write_header(self) -> None:
        """Of the length so far; numpy pads the header for exactly this: an axis that grows."""
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)


def open_or_build(
    read: Callable[[], Iterable[bytes]], tokenizer: Tokenizer, cache_dir: Path, key: str, split: str
) -> TokenStore:
    """The store of one split from the cache, or built into it from the documents that `read` gives.

    key: names the source's content. Raises RunError where it cannot be written or read back.
    """
    kind = "-sized" if tokenizer.bytes_per_token is None else ""  # with bytes.npy
    home = cache_dir / "tokens" / f"{key}-{tokenizer.fingerprint}{kind}-{split}"
    if home.is_dir():
        try:
            return TokenStore.open(home)
        except DamagedStore as error:
            log.warning("%s: damaged (%s); it is built again", home, error)
    with new_directory(home, "write the tokenised data") as new:
        TokenStore.write(read(), tokenizer, new)
        store = TokenStore.open(new)  # before the rename: the mapping then outlives the name
        try:
            if home.is_dir():
                TokenStore.open(home)
        except DamagedStore:
            with contextlib.suppress(FileNotFoundError):  # another process moved it first
                os.rename(home, new.parent / "old")
    return store
