"""Words as tokens, most frequent first, as the corpora of word-level language models have it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError

FORMAT = (
    1  # of the rules below and of the JSON: raise it when either changes, or token caches go stale
)
NEWLINE, SEPARATOR, UNKNOWN = b"\n", b"", b"<unk>"  # no word between spaces is one of the first two
SPECIAL = (NEWLINE, SEPARATOR, UNKNOWN)
CHUNK = (
    1 << 20
)  # bytes split at a time: a corpus in one document then takes no list of all of its words


def known_ids(ids: ArrayLike | Iterable[int], vocab_size: int) -> np.ndarray:
    """int64 [T]. Raises ValueError for an id outside the vocabulary."""
    ids_T = np.asarray(ids, np.int64).reshape(-1)
    if ids_T.size and not (0 <= np.min(ids_T) and np.max(ids_T) < vocab_size):
        raise ValueError(
            f"token ids from {np.min(ids_T)} to {np.max(ids_T)} are not all in [0, {vocab_size})"
        )
    return ids_T


class WordTokenizer:
    """One token per word between spaces; a newline is the token `<eos>`; the words left out are all `<unk>`.

    Ids go by frequency in the training split, ties by the word's bytes, so that the cutoffs of an adaptive softmax cut where
    they should. `<eos>` (as often as there are newlines), the separator (documents) and `<unk>` (what was left out, and
    the word `<unk>` itself, which is what WikiText-103 has in their place) have their places in the same order.
    Runs of spaces, and spaces beside a newline, are not kept; otherwise `decode` gives back the text of known words.

    A word stands for its bytes and the space or newline after it, `<eos>` for the whole bytes that this leaves of the
    training split per newline (0 of "a b\\nc d\\n", 2 of WikiText's " a b \\n"). `<unk>` stands for no bytes: what is not
    predicted does not make bits per byte better. The sum over a document is thus its size, but for unknown words, for
    spaces that are not like the average, and for one byte more where it ends in a word, which the separator then ends.
    """

    tokens_are_words = True

    def __init__(self, words: Sequence[bytes], line_bytes: int) -> None:
        """words: by id, distinct, with NEWLINE, SEPARATOR and UNKNOWN among them. line_bytes: what `<eos>` stands for."""
        self._words, self._line_bytes = list(words), line_bytes
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        self.separator = self.start = self._ids[SEPARATOR]
        self._unknown = self._ids[UNKNOWN]
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self.fingerprint = (
            f"words-{self.vocab_size}-{hashlib.sha256(self.to_json().encode()).hexdigest()[:24]}"
        )

    @classmethod
    def train(cls, documents: Iterable[bytes], min_count: int) -> WordTokenizer:
        """The vocabulary of the words that occur at least `min_count` times. Raises ConfigError where there is none."""
        counts: Counter[bytes] = Counter()
        n_documents = n_bytes = 0
        for document in documents:
            n_documents, n_bytes = n_documents + 1, n_bytes + len(document)
            for words in ticking(split_words(document)):
                counts.update(words)
        newlines = counts.pop(NEWLINE, 0)
        left = n_bytes - sum(n * (len(word) + 1) for word, n in counts.items())
        unknown = counts.pop(UNKNOWN, 0)
        kept = {word: n for word, n in counts.items() if n >= min_count}
        if not kept:
            remedy = "no word occurs that often in the training split; give a smaller number, or another data.path"
            raise ConfigError("config.data.min_count", min_count, remedy)
        unknown += counts.total() - sum(kept.values())
        kept |= {NEWLINE: newlines, SEPARATOR: n_documents, UNKNOWN: unknown}
        return cls(
            sorted(kept, key=lambda word: (-kept[word], word)),
            max(0, left // newlines) if newlines else 0,
        )

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [V]; see the class."""
        special = {NEWLINE: self._line_bytes, SEPARATOR: 0, UNKNOWN: 0}
        return np.array([special.get(word, len(word) + 1) for word in self._words], np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        """The smallest unsigned type, [T], without separators; a str is encoded as UTF-8, as ByteTokenizer does."""
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        unknown = itertools.repeat(self._unknown)
        parts = [
            np.fromiter(map(self._ids.get, words, unknown), self._dtype, len(words))
            for words in ticking(split_words(data))
        ]
        return np.concatenate([np.zeros(0, self._dtype), *parts])

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """Words with single spaces between, `<unk>` among them; separators are dropped. Raises ValueError as ByteTokenizer."""
        ids_T = known_ids(ids, self.vocab_size)
        words = [self._words[i] for i in ids_T[ids_T != self.separator].tolist()]
        return re.sub(rb" ?\n ?", b"\n", b" ".join(words))

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        """What `from_json` reads; ASCII, bytes that are not UTF-8 as lone surrogates."""
        words = [word.decode("utf-8", "surrogateescape") for word in self._words]
        return json.dumps(
            {"kind": "words", "format": FORMAT, "line_bytes": self._line_bytes, "words": words},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> WordTokenizer:
        """Raises UserError for what `to_json` did not write."""
        try:
            found = json.loads(text)
            if (found["kind"], found["format"]) != ("words", FORMAT):
                raise ValueError(
                    f"{found['kind']!r} of format {found['format']!r}, this version reads {FORMAT}"
                )
            words, line_bytes = (
                [word.encode("utf-8", "surrogateescape") for word in found["words"]],
                found["line_bytes"],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"the vocabulary of words cannot be read ({type(error).__name__}: {error})"
            ) from error
        unique = set(words)
        if (
            len(unique) != len(words)
            or not unique.issuperset(SPECIAL)
            or type(line_bytes) is not int
            or line_bytes < 0
        ):
            raise UserError(
                "the vocabulary of words is damaged (a word twice, no <unk>, separator or newline, or no line_bytes)"
            )
        return cls(words, line_bytes)


def split_words(document: bytes) -> Iterator[list[bytes]]:
    """The words and newlines of a document, a megabyte at a time."""
    start = 0
    while start < len(document):
        end = document.find(b" ", start + CHUNK)
        end = len(document) if end < 0 else end
        yield list(filter(None, document[start:end].replace(NEWLINE, b" \n ").split(b" ")))
        start = end
