"""Any tokenizer of the Hugging Face tokenizers library, as imported models have them: SentencePiece's kind, normalisers and all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.data.tokenizer import BYTE_OF, ends, from_file, json_object, known_ids, of_library


class LibraryTokenizer:
    """A tokenizer.json that need not give back its text exactly; where it does, `BPETokenizer` is the one to use.

    Bytes that are not UTF-8 become U+FFFD before the library sees them, and a token stands for the bytes it is written with
    (of SentencePiece: with a space for its mark), so that bits per byte are of the text as the tokenizer writes it.
    Separator and start are found as `BPETokenizer` finds them.
    """

    tokens_are_words = False

    def __init__(self, content: dict[str, Any]) -> None:
        """content: the object in a tokenizer.json, or what `to_json` made of it. Raises UserError where it cannot be used."""
        self._content = content.get("file", content) | {"truncation": None, "padding": None}
        text = json.dumps(self._content, sort_keys=True, ensure_ascii=False)
        self._library = of_library(text)
        self._library.encode_special_tokens = True  # as text
        known = self._library.get_vocab(with_added_tokens=True)
        special = {token["content"]: token["id"] for token in self._content.get("added_tokens") or () if token["special"]}
        self.separator, self.start = ends(special)
        self.vocab_size = max(known.values()) + 1
        self._sizes_V = np.zeros(self.vocab_size, np.int32)
        for token, i in known.items():
            self._sizes_V[i] = 0 if token in special else _n_bytes(token, "ByteLevel" in text)
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self.fingerprint = f"library-{self.vocab_size}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    @classmethod
    def load(cls, path: str) -> LibraryTokenizer:
        """Raises ConfigError, naming config.data.tokenizer_file, for what cannot be used."""
        return from_file(lambda text: cls(json_object(text)), path)

    @property
    def file(self) -> dict[str, Any]:
        """The object of a tokenizer.json that the library reads."""
        return self._content

    def to_json(self) -> str:
        return json.dumps({"kind": "library", "file": self._content}, indent=1)

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [V]; special tokens stand for none."""
        return self._sizes_V.copy()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The smallest unsigned type, [T], without separators."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        clean = text.encode("utf-8", "replace").decode()  # lone surrogates, which the library does not take
        return np.asarray(self._library.encode_batch_fast([clean], add_special_tokens=False)[0].ids, self._dtype)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The text of `decode` in UTF-8. Raises ValueError for an id outside the vocabulary."""
        return self.decode(ids).encode()

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text as the library writes it; special tokens are dropped."""
        return self._library.decode(known_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)


def _n_bytes(token: str, of_bytes: bool) -> int:
    """Bytes of text that a token is written with; of_bytes: the file writes bytes as characters, as GPT-2's does."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return 1
    if of_bytes and all(c in BYTE_OF for c in token):
        return len(token)
    return len(token.replace("\u2581", " ").encode())
