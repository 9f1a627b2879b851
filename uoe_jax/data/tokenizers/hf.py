"""Files of the Hugging Face tokenizers library, and any tokenizer among them: SentencePiece's kind, WordPiece, and so on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.data.tokenizers.ends import Ends, by_name, find_ends
from uoe_jax.data.tokenizers.words import known_ids
from uoe_jax.errors import UserError

EndsOf = Callable[[Mapping[str, Any]], Ends]  # of the object in a tokenizer.json
_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_MOST = np.iinfo(np.uint16).max  # bytes that one token can be counted for


class TokenizerFile:
    """A tokenizer.json as the library reads it, and which of its tokens end and begin a document.

    Attributes:
      content: the object that the library reads; without truncation and padding, which our configuration decides.
      library: of the tokenizers package; special tokens in a text are text like any other.
      separator, start: ids.
      special: {special token: id}.
      ends: what was found, with its notes.
    """

    def __init__(self, content: Mapping[str, Any], kind: str, ends: EndsOf | None = None) -> None:
        """content: the object in a tokenizer.json, or what `to_json` wrote.

        Args:
          kind: "bpe" or "library", for `to_json` and the fingerprint.
          ends: finds the ends. None: those that `to_json` wrote, else by name.

        Raises:
          UserError: it is no tokenizer.json, or its ends are unknown.
        """
        if "file" in content and "kind" in content:
            separator, start, content = (
                content.get("separator"),
                content.get("start"),
                content["file"],
            )
            if not isinstance(content, dict):
                raise UserError("is no tokenizer.json (its file is no object)")
            if ends is None and separator and start:
                ends = lambda _: Ends(separator, start)  # noqa: E731
        self.kind, self.content = kind, {**content, "truncation": None, "padding": None}
        self.library = _opened(self._text())
        self.ends = (ends or _by_name)(self.content)
        if any(end not in self.special for end in self.ends[:2]):
            self._make_ends_special()
        self.library.encode_special_tokens = True  # as text
        self.separator, self.start = (
            self.special[self.ends.separator],
            self.special[self.ends.start],
        )
        self.digest = hashlib.sha256(self._text().encode()).hexdigest()[:24]
        if not self._ends_by(lambda: by_name(list(self.special))):
            self.digest += f"-{self.separator}-{self.start}"

    @property
    def special(self) -> dict[str, int]:
        added = self.content.get("added_tokens") or ()
        return {token["content"]: token["id"] for token in added if token.get("special")}

    def to_json(self) -> str:
        """What the constructor reads: a tokenizer.json where the ends follow from it, as they do with one made here."""
        follow = self._ends_by(lambda: by_name(list(self.special))) and self._ends_by(
            lambda: find_ends(self.content, {})
        )
        if self.kind == "bpe" and follow:
            return json.dumps(self.content, indent=1)
        ends = {} if follow else {"separator": self.ends.separator, "start": self.ends.start}
        return json.dumps({"kind": self.kind, "file": self.content, **ends}, indent=1)

    def _text(self) -> str:
        return json.dumps(self.content, sort_keys=True, ensure_ascii=False)

    def _ends_by(self, find: Callable[[], Ends]) -> bool:
        """Whether these are the ends that are found so: by name, as versions before 2026-11-29 did, or from the content."""
        try:
            return find()[:2] == self.ends[:2]
        except UserError:
            return False

    def _make_ends_special(self) -> None:
        """The library finds other added tokens in text, where an end would cut a document."""
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        given = {token["content"]: dict(token) for token in self.content.get("added_tokens") or ()}
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        for end in self.ends[:2]:
            given[end] = {
                **plain,
                **given.get(end, {"id": vocabulary[end], "content": end}),
                "special": True,
            }
        self.content["added_tokens"] = sorted(given.values(), key=lambda token: token["id"])
        self.library = _opened(self._text())


def _by_name(content: Mapping[str, Any]) -> Ends:
    return by_name(
        [token["content"] for token in content.get("added_tokens") or () if token.get("special")]
    )


def _opened(text: str) -> Any:
    """What the tokenizers library makes of a tokenizer.json; raises UserError where that is nothing."""
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_str(text)
    except BaseException as error:  # a panic in the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise UserError(f"is no tokenizer.json ({' '.join(str(error).split())})") from error


class LibraryTokenizer:
    """A tokenizer.json that need not give back its text exactly; where it does, `BPETokenizer` is the one to use.

    Bytes that are not UTF-8 become U+FFFD before the library sees them. How many bytes of a document a token stands for
    comes from its place in the document (`encode_with_bytes`).
    """

    tokens_are_words = False
    bytes_per_token = None

    def __init__(self, content: Mapping[str, Any], ends: EndsOf | None = None) -> None:
        """content, ends: as of `TokenizerFile`. Raises UserError where it cannot be used."""
        self.file = TokenizerFile(content, "library", ends)
        if self.file.content["model"].get("dropout"):
            raise UserError("gives a text other tokens every time (model.dropout); put null there")
        self._library = self.file.library
        self.separator, self.start = self.file.separator, self.file.start
        known = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(known.values()) + 1
        self._unknown = _unknown_id(self.file.content["model"], known)
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self.fingerprint = f"library-{self.vocab_size}-{self.file.digest}"

    def to_json(self) -> str:
        return self.file.to_json()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The smallest unsigned type, [T], without separators."""
        clean = _as_text(text)[0]
        return np.asarray(
            self._library.encode_batch_fast([clean], add_special_tokens=False)[0].ids, self._dtype
        )

    def encode_with_bytes(self, document: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """(`encode`, uint16 [T + 1]: bytes of the document that each token stands for, the separator last).

        White space that belongs to no token counts for the next one. Other characters that no token covers, and those of
        an unknown token, count for none: the sum is then less than the document, and bits per byte cannot be told.
        """
        text, code_C = _as_text(document)
        found = self._library.encode_batch([text], add_special_tokens=False)[0]
        ids_T = np.asarray(found.ids, self._dtype)
        spans_T2 = np.asarray(found.offsets, np.int64).reshape(-1, 2)
        is_unknown_T = (
            ids_T == self._unknown if self._unknown is not None else np.zeros(len(ids_T), bool)
        )
        told_C = _covered(spans_T2[~is_unknown_T], len(code_C)) | np.isin(code_C, _SPACES)
        told_C &= ~_covered(spans_T2[is_unknown_T], len(code_C))
        before_C = np.concatenate([[0], np.cumsum(_utf8_bytes(code_C) * told_C)])
        ends_T = np.maximum.accumulate(spans_T2[:, 1])
        sizes = np.diff(before_C[np.concatenate([[0], ends_T, [len(code_C)]])])
        return ids_T, np.minimum(sizes, _MOST).astype(np.uint16)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The text of `decode` in UTF-8. Raises ValueError for an id outside the vocabulary."""
        return self.decode(ids).encode()

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text as the library writes it; special tokens are dropped."""
        return self._library.decode(
            known_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True
        )


def _as_text(document: str | bytes) -> tuple[str, np.ndarray]:
    """(text for the library, uint32 [C]: its characters, bytes that are not UTF-8 as lone surrogates)."""
    if isinstance(document, bytes):
        document = document.decode("utf-8", "surrogateescape")
    code_C = np.frombuffer(document.encode("utf-32-le", "surrogatepass"), np.uint32)
    if (code_C >> 11 == 0xD800 >> 11).any():
        document = "".join(
            "\N{REPLACEMENT CHARACTER}" if "\ud800" <= c <= "\udfff" else c for c in document
        )
    return document, code_C


def _utf8_bytes(code_C: np.ndarray) -> np.ndarray:
    """Bytes of each character in UTF-8; 1 of a byte that is none."""
    n_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
    n_C[(code_C >= 0xDC80) & (code_C <= 0xDCFF)] = 1
    return n_C


def _covered(spans_T2: np.ndarray, length: int) -> np.ndarray:
    """bool [length]: whether a character lies in one of the spans."""
    steps = np.bincount(spans_T2[:, 0], minlength=length + 1) - np.bincount(
        spans_T2[:, 1], minlength=length + 1
    )
    return np.cumsum(steps[:length]) > 0


def _unknown_id(model: Mapping[str, Any], known: Mapping[str, int]) -> int | None:
    """The id of the token for what the vocabulary lacks; None where there is none."""
    if isinstance(model.get("unk_id"), int):
        return model["unk_id"]
    return known.get(model.get("unk_token") or "")
