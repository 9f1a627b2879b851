"""Tokenizers: bytes to token ids and back. A tokenizer is anything with the members of `Tokenizer`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.data.tokenizers.ends import FILES, SEPARATORS, find_ends
from uoe_jax.data.tokenizers.hf import EndsOf, LibraryTokenizer, TokenizerFile
from uoe_jax.data.tokenizers.words import WordTokenizer, known_ids
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.runtime_env import expanded

T = TypeVar("T")


class Tokenizer(Protocol):
    """What the data room and generation ask of a tokenizer.

    Attributes:
      vocab_size: V, the separator included.
      separator: the id that is a document's last target; it stands for no bytes.
      start: the id that is a document's first input: the separator, but where a tokenizer has one of its own for that.
      bytes_per_token: int32 [V], how many bytes of text each token stands for (bits per byte divides by these); None where
        that depends on the document: `encode_with_bytes` says it then.
      fingerprint: two tokenizers with one fingerprint give the same ids for the same bytes, in any process.
      tokens_are_words: whether perplexity per token is perplexity per word.
    """

    vocab_size: int
    separator: int
    start: int
    fingerprint: str
    tokens_are_words: bool

    @property
    def bytes_per_token(self) -> np.ndarray | None: ...
    def encode(self, text: str | bytes) -> np.ndarray: ...
    def decode(self, ids: ArrayLike) -> str: ...
    def decode_bytes(self, ids: ArrayLike) -> bytes: ...
    def to_json(self) -> str:
        """What `stored` reads."""


class ByteTokenizer:
    """One token per byte, ids 0-255; 256 is the document separator."""

    vocab_size = 257
    separator = start = 256
    fingerprint = "bytes-257-1"
    tokens_are_words = False

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
        ids_T = known_ids(ids, self.vocab_size)
        return ids_T[ids_T != self.separator].astype(np.uint8).tobytes()

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> str:
        return json.dumps({"kind": "bytes", "fingerprint": self.fingerprint})


# --- pieces of words ----------------------------------------------------------------------------------------------

_LOSSLESS = (
    "ByteLevel",
    "Split",
    "Digits",
    "Punctuation",
)  # pre-tokenizers that keep every character
# The characters that stand for bytes in byte-level vocabularies, as GPT-2's encoder.py has it: bytes with a picture in
# Latin-1 stand for themselves, the others are counted up from U+0100.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(b): b for b in _PRINTABLE}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


class BPETokenizer:
    """Byte-level byte-pair encoding, as a tokenizer.json of the Hugging Face tokenizers library has it.

    Any bytes come back exactly, and their tokens stand for exactly their number: bytes that are not UTF-8, which the
    library does not take, become their one-byte tokens, and the text between them is encoded piece by piece.
    Special tokens are never found in text: the characters `<|endoftext|>` in a document are text like any other.

    Which tokens end and begin a document: `data.ends`.
    """

    tokens_are_words = False

    def __init__(self, content: Mapping[str, Any], ends: EndsOf | None = None) -> None:
        """content, ends: as of `TokenizerFile`. Raises UserError for what is not exact byte-level BPE."""
        self.file = TokenizerFile(content, "bpe", ends)
        self._library = self.file.library
        explicit = json.loads(self._library.to_str())  # with every default
        _check_exact(explicit)
        added = explicit["added_tokens"]
        self._bytes = _token_bytes(added, self._library.get_vocab(with_added_tokens=False))
        self.vocab_size = len(self._bytes)
        self.separator, self.start = self.file.separator, self.file.start
        ids = {token: i for i, token in enumerate(self._bytes) if len(token) == 1}
        if missing := [b for b in range(256) if bytes([b]) not in ids]:
            raise UserError(
                f"has no token for the byte {missing[0]:#04x}, so not every text can be written with it"
            )
        for token in (
            self.file.content.get("added_tokens") or ()
        ):  # the library counts on where there is a hole
            if self._library.token_to_id(token["content"]) != token["id"]:
                raise UserError(
                    f"gives its added token {token['content']!r} the id {token['id']}, with ids left out before it"
                )
        self._byte_ids = np.array([ids[bytes([b])] for b in range(256)])
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self._sizes_V = np.array([len(token) for token in self._bytes], np.int32)
        self.fingerprint = f"bpe-{self.vocab_size}-{self.file.digest}"

    @classmethod
    def train(cls, documents: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """At most `vocab_size` tokens: the separator, 256 bytes, and the commonest pairs as long as any occurs twice."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[SEPARATORS[0]],
            initial_alphabet=list(BYTE_OF),
            show_progress=False,
        )
        library.train_from_iterator(
            (piece for document in documents for piece in _pieces(document)[::2]), trainer
        )
        return cls(json.loads(library.to_str()))

    @classmethod
    def load(cls, path: str) -> BPETokenizer:
        """From a tokenizer.json. Raises ConfigError, naming config.data.tokenizer_file, for what cannot be used."""
        return from_file(cls, path)

    def to_json(self) -> str:
        """A tokenizer.json that the tokenizers library reads as well, where the ends follow from it."""
        return self.file.to_json()

    @property
    def bytes_per_token(self) -> np.ndarray:
        """int32 [V]; special tokens, and ids that nothing has, stand for none."""
        return self._sizes_V.copy()

    def encode(self, text: str | bytes) -> np.ndarray:
        """The smallest unsigned type, [T], without separators; a str is encoded as UTF-8, as ByteTokenizer does.

        Raises UserError where the library's tokens do not stand for the text, whatever the file has in it.
        """
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        parts = [np.zeros(0, self._dtype)]
        for i, piece in enumerate(_pieces(data)):
            if i % 2:
                parts.append(
                    self._byte_ids[
                        np.frombuffer(piece.encode("utf-8", "surrogateescape"), np.uint8)
                    ]
                )
            elif piece:  # a batch of one: the only call that does not keep track of where each token was in the text
                parts.append(
                    self._library.encode_batch_fast([piece], add_special_tokens=False)[0].ids
                )
        ids_T = np.concatenate([np.asarray(part, self._dtype) for part in parts])
        if (stands_for := int(self._sizes_V[ids_T].sum(dtype=np.int64))) != len(data):
            raise UserError(
                f"data.tokenizer_file: the tokens of a document of {len(data)} bytes stand for {stands_for}; "
                "this tokenizer is not exact, use another file"
            )
        return ids_T

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The exact bytes; special tokens are dropped. Raises ValueError for an id outside the vocabulary."""
        return b"".join([self._bytes[i] for i in known_ids(ids, self.vocab_size).tolist()])

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def _pieces(data: bytes) -> list[str]:
    """Text in the even places, runs of bytes that are not UTF-8 (as lone surrogates) in the odd ones."""
    try:
        return [data.decode()]
    except UnicodeDecodeError:
        return re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))


def _check_exact(content: dict[str, Any]) -> None:
    """Raises UserError where text would be altered on its way to tokens, or cut by chance."""
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(f"is not byte-level BPE (its model is {model['type']})")
    steps = list(steps_of(content["pre_tokenizer"]))
    if sum(step["type"] == "ByteLevel" for step in steps) != 1:
        raise UserError(
            "is not byte-level BPE (its pre_tokenizer has no ByteLevel step, or several)"
        )
    for step in steps:
        if (
            step["type"] not in _LOSSLESS
            or step.get("behavior") == "Removed"
            or step.get("add_prefix_space")
        ):
            raise UserError(
                f"does not give back its text (pre_tokenizer {json.dumps(step)} adds or drops characters)"
            )
    if content["normalizer"] is not None:
        raise UserError("does not give back its text (it has a normalizer; put null in its place)")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise UserError(
                f"does not give back its text alike every time (model.{name} is {model[name]!r}; put null there)"
            )


def steps_of(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, sequences unpacked."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for inner in (*(step.get("pretokenizers") or ()), *(step.get("normalizers") or ())):
            yield from steps_of(inner)
    elif isinstance(step, dict):
        yield step


def _token_bytes(added: list[dict[str, Any]], vocabulary: dict[str, int]) -> list[bytes]:
    """By id the bytes that every token stands for; special tokens stand for none."""
    found: dict[int, bytes] = {token["id"]: b"" for token in added if token["special"]}
    plain = [token for token in added if not token["special"]]
    if stripped := [token["content"] for token in plain if token["lstrip"] or token["rstrip"]]:
        raise UserError(
            f"does not give back its text (the added token {stripped[0]!r} takes the spaces beside it)"
        )
    named = {token["content"]: (token["id"], token["content"].encode()) for token in plain}
    for token, i in sorted(vocabulary.items()):
        if token not in named and i not in found:
            try:
                named[token] = i, bytes([BYTE_OF[c] for c in token])
            except KeyError as error:
                raise UserError(
                    f"is not byte-level BPE (its token {token!r} does not stand for bytes)"
                ) from error
    for token, (i, data) in named.items():
        if found.setdefault(i, data) != data:
            raise UserError(f"has two tokens of the id {i}, one of them {token!r}")
    return [found.get(i, b"") for i in range(max(found, default=-1) + 1)]


# --- which ----------------------------------------------------------------------------------------------------------


def from_file(
    made: Callable[[dict[str, Any], EndsOf], T], path: str, separator: str = "", start: str = ""
) -> T:
    """A tokenizer made of the object in a file, and of what the files beside it say of its ends.

    Args:
      made: the constructor. separator, start: data.separator and data.start.

    Raises:
      ConfigError: names config.data.tokenizer_file, where the file cannot be read or `made` raises UserError.
    """
    from etils import epath

    train = "make one with uoe tokenizer train --config=… --vocab=4096 --out=tokenizer.json"
    key = "config.data.tokenizer_file"
    if not path:
        raise ConfigError(
            key, path, f"tokenizers 'bpe' and 'library' take a file; give one, or {train}"
        )
    file = epath.Path(expanded(path, key))
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except Exception as error:  # the clients of gs:// raise exceptions of a dozen kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(
            key, path, f"cannot be read ({reason}); give another file, or {train}"
        ) from error
    try:
        content = json_object(text)
        separator = separator or str(
            content.get("separator", "")
        )  # of a tokenizer that a run has kept
        start = start or str(content.get("start", ""))
        ends = functools.partial(
            find_ends, files=files_beside(file.parent), separator=separator, start=start
        )
        return made(content, ends)
    except UserError as error:
        raise ConfigError(key, path, f"{error}; give another file, or {train}") from error


def files_beside(directory: Any) -> dict[str, dict[str, Any]]:
    """{name: object} of the files of a model that say which tokens are its ends; UserError for one that is damaged."""
    from uoe_jax.workdir import read_json

    remedy = "it says which tokens end and begin a document; mend it or take it away"
    found = {name: read_json(directory / name, remedy) for name in FILES}
    return {name: values for name, values in found.items() if values is not None}


def load_tokenizer(kind: str, file: str, separator: str = "", start: str = "") -> Tokenizer | None:
    """The tokenizer that data.tokenizer names; None for words, which are counted in the data (`WordTokenizer.train`).

    file, separator, start: keys of `data`. Raises ConfigError for a file that is missing, is not what it should be, or has no
    use.
    """
    if kind in _FROM_FILE:
        made: Callable[[dict[str, Any], EndsOf], Tokenizer] = _FROM_FILE[kind]
        return from_file(made, file, separator, start)
    for key, value in (("tokenizer_file", file), ("separator", separator), ("start", start)):
        if value:
            remedy = f"is of no use with data.tokenizer={kind!r}; give 'bpe' or 'library' there"
            raise ConfigError(f"config.data.{key}", value, remedy)
    return ByteTokenizer() if kind == "bytes" else None


_FROM_FILE: dict[str, type[BPETokenizer] | type[LibraryTokenizer]] = {
    "bpe": BPETokenizer,
    "library": LibraryTokenizer,
}


def stored(text: str) -> Tokenizer:
    """The tokenizer of any kind whose `to_json` this is. Raises UserError for what is none."""
    content = json_object(text)
    kind = content.get("kind", "bpe" if "model" in content else None)
    if kind == "bytes" and content.get("fingerprint") == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if kind == "words":
        return WordTokenizer.from_json(text)
    if kind in _FROM_FILE:
        return _FROM_FILE[kind](content)
    raise UserError("is no tokenizer that this version of uoe_jax knows")


def json_object(text: str) -> dict[str, Any]:
    """Raises UserError for what is no JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError("is not a JSON object")
    return content
