"""Words as tokens, most frequent first, as in the corpora of word-level language models."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.data.tokenizers.base import Tokenizer, as_bytes, known_ids
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError

FORMAT = 1  # of the rules below and of the JSON: raise it with either, or token caches go stale
# Splitting at spaces gives none of the first two.
SPECIAL = NEWLINE, SEPARATOR, UNKNOWN = b"\n", b"", b"<unk>"
CHUNK = 1 << 20  # bytes split at a time, so that no list holds all words of a large document


class WordTokenizer(Tokenizer):
    """One token per word between spaces; a newline is `<eos>`; all rare words are `<unk>`.

    Ids go by frequency in the training split, ties by the word's bytes, as the cutoffs of an
    adaptive softmax expect. `<eos>` counts newlines, the separator documents, `<unk>` rare words
    and the word `<unk>` itself (WikiText-103 has it). Runs of spaces, and spaces beside a newline,
    are not kept; otherwise `decode` gives back the text of known words.

    A word stands for its bytes and the space or newline after it. `<eos>` stands for the bytes of
    the training split that this leaves per newline, rounded down (0 in "a b\\nc d\\n", 2 in
    WikiText's " a b \\n"). `<unk>` stands for no bytes: what is not predicted must not improve bits
    per byte. So the bytes of a document's tokens add up to its size, except for unknown words, for
    unusual spaces, and for one byte more where it ends in a word, which the separator then ends.
    """

    tokens_are_words = True

    def __init__(self, words: Sequence[bytes], line_bytes: int) -> None:
        """words: by id, distinct, `SPECIAL` among them. line_bytes: of `<eos>`."""
        self._words, self._line_bytes = list(words), line_bytes
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        self.separator = self.start = self._ids[SEPARATOR]
        self._unknown = self._ids[UNKNOWN]
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()[:24]
        self.fingerprint = f"words-{self.vocab_size}-{digest}"

    @classmethod
    def train(cls, documents: Iterable[bytes], min_count: int) -> Self:
        """The words that occur at least `min_count` times. Raises ConfigError where none does."""
        counts = Counter[bytes]()
        n_documents = n_bytes = 0
        for document in documents:
            n_documents, n_bytes = n_documents + 1, n_bytes + len(document)
            for words in ticking(split_words(document)):
                counts.update(words)
        newlines = counts.pop(NEWLINE, 0)
        rest = n_bytes - sum(n * (len(word) + 1) for word, n in counts.items())
        unknown = counts.pop(UNKNOWN, 0)
        kept = {word: n for word, n in counts.items() if n >= min_count}
        if not kept:
            remedy = "no word of the training split occurs that often; give less, or other data"
            raise ConfigError("config.data.min_count", min_count, remedy)
        unknown += counts.total() - sum(kept.values())
        kept |= {NEWLINE: newlines, SEPARATOR: n_documents, UNKNOWN: unknown}
        by_frequency = sorted(kept, key=lambda word: (-kept[word], word))
        return cls(by_frequency, max(0, rest // newlines) if newlines else 0)

    @property
    def bytes_per_token(self) -> np.ndarray:
        special = {NEWLINE: self._line_bytes, SEPARATOR: 0, UNKNOWN: 0}
        return np.array([special.get(word, len(word) + 1) for word in self._words], np.int32)

    def encode(self, text: str | bytes) -> np.ndarray:
        words = itertools.chain.from_iterable(ticking(split_words(as_bytes(text))))
        ids = map(self._ids.get, words, itertools.repeat(self._unknown))
        return np.fromiter(ids, self._dtype)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        ids_T = known_ids(ids, self.vocab_size)
        words = [self._words[i] for i in ids_T[ids_T != self.separator].tolist()]
        return re.sub(rb" ?\n ?", b"\n", b" ".join(words))

    def to_json(self) -> str:
        """What `from_json` reads; ASCII, bytes that are not UTF-8 as lone surrogates."""
        words = [word.decode("utf-8", "surrogateescape") for word in self._words]
        found = {"kind": "words", "format": FORMAT, "line_bytes": self._line_bytes, "words": words}
        return json.dumps(found, indent=1)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """content: the object that `to_json` wrote. Raises UserError for another one."""
        try:
            if (version := content["format"]) != FORMAT:
                raise ValueError(f"format {version!r}, this version reads {FORMAT}")
            words = [word.encode("utf-8", "surrogateescape") for word in content["words"]]
            unique, line_bytes = set(words), content["line_bytes"]
            is_whole = len(unique) == len(words) and unique.issuperset(SPECIAL)
            if not is_whole or type(line_bytes) is not int or line_bytes < 0:
                raise ValueError("a word twice, no <unk>, separator or newline, or no line_bytes")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the vocabulary of words cannot be read ({reason})") from error
        return cls(words, line_bytes)


def split_words(document: bytes) -> Iterator[list[bytes]]:
    """The words and newlines of a document, a megabyte at a time."""
    start = 0
    while start < len(document):
        end = document.find(b" ", start + CHUNK)
        end = len(document) if end < 0 else end
        yield list(filter(None, document[start:end].replace(NEWLINE, b" \n ").split(b" ")))
        start = end
