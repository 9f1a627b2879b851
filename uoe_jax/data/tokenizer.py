"""Tokenizers: bytes to token ids and back. A tokenizer is anything with the members of `Tokenizer`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike


class Tokenizer(Protocol):
    """What the data room and generation ask of a tokenizer.

    Attributes:
      vocab_size: V, the separator included.
      separator: the id that is a document's first input and its last target; it stands for no bytes.
      bytes_per_token_V: int32 [V], how many bytes of text each token stands for (bits per byte divides by these).
      fingerprint: two tokenizers with one fingerprint give the same ids for the same bytes, in any process.
    """

    vocab_size: int
    separator: int
    fingerprint: str

    @property
    def bytes_per_token(self) -> np.ndarray: ...
    def encode(self, text: str | bytes) -> np.ndarray: ...
    def decode(self, ids: ArrayLike) -> str: ...
    def decode_bytes(self, ids: ArrayLike) -> bytes: ...


class ByteTokenizer:
    """One token per byte, ids 0-255; 256 is the document separator."""

    vocab_size = 257
    separator = 256
    fingerprint = "bytes-257-1"

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [257]: one byte each, the separator none."""
        return np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, text: str | bytes) -> np.ndarray:
        """uint16 [T] without separators; a str is encoded as UTF-8 (lone surrogates as the bytes they stand for)."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The exact bytes; separators are dropped. Raises ValueError for an id outside the vocabulary."""
        ids_T = np.asarray(ids, np.int64).reshape(-1)
        if ids_T.size and not (0 <= ids_T.min() and ids_T.max() < self.vocab_size):
            raise ValueError(f"token ids from {ids_T.min()} to {ids_T.max()} are not all in [0, {self.vocab_size})")
        return ids_T[ids_T != self.separator].astype(np.uint8).tobytes()

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")
