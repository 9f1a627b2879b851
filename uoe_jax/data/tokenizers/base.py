"""What every tokenizer provides, and the byte tokenizer."""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.errors import UserError


class Tokenizer(Protocol):
    """Bytes to token ids and back."""

    vocab_size: int  # V, the separator included
    separator: int  # the id of a document's last target; it stands for no bytes
    start: int  # the id of a document's first input: the separator, unless there is another
    fingerprint: str  # equal ones mean equal ids for equal bytes, in any process
    tokens_are_words: bool = False  # whether perplexity per token is perplexity per word

    @property
    def bytes_per_token(self) -> np.ndarray | None:
        """int32 [V], bytes of text per token, for bits per byte; None: see `encode_with_bytes`."""

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids [T] without separators, in the smallest unsigned type; of a str, see `as_bytes`."""

    def encode_with_bytes(self, document: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """(`encode`, uint16 [T + 1]: bytes of the document per token, the separator last)."""
        raise TypeError("every token has a fixed number of bytes; see bytes_per_token")

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The text without separators. Raises ValueError for an id outside the vocabulary."""

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """As `decode_bytes`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """What `load.stored` reads."""


class ByteTokenizer(Tokenizer):
    """One token per byte, ids 0-255; 256 is the document separator. Decodes exactly."""

    vocab_size = 257
    separator = start = 256
    fingerprint = "bytes-257-1"

    @property
    def bytes_per_token(self) -> np.ndarray:
        return np.append(np.ones(256, np.int32), np.int32(0))

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(as_bytes(text), np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        ids_T = known_ids(ids, self.vocab_size)
        return ids_T[ids_T != self.separator].astype(np.uint8).tobytes()

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes", "fingerprint": self.fingerprint})


def as_bytes(text: str | bytes) -> bytes:
    """UTF-8; lone surrogates become the bytes they stand for."""
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text


def known_ids(ids: ArrayLike | Iterable[int], vocab_size: int) -> np.ndarray:
    """int64 [T]. Raises ValueError for an id outside the vocabulary."""
    ids_T = np.asarray(ids, np.int64).reshape(-1)
    if ids_T.size and not 0 <= np.min(ids_T) <= np.max(ids_T) < vocab_size:
        found = f"token ids from {np.min(ids_T)} to {np.max(ids_T)}"
        raise ValueError(f"{found} are not all in [0, {vocab_size})")
    return ids_T


def json_object(text: str) -> dict[str, Any]:
    """Raises UserError unless the text is a JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError("is not a JSON object")
    return content
