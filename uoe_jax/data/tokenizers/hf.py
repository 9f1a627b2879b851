"""Tokenizers in the file format of Hugging Face's `tokenizers` library (tokenizer.json)."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from uoe_jax.data.tokenizers import ends as ends_lib
from uoe_jax.data.tokenizers.base import Tokenizer, as_bytes, known_ids
from uoe_jax.data.tokenizers.ends import Ends, Json, added_tokens, find_ends_by_name, special
from uoe_jax.errors import UserError

EndsOf = Callable[[Json], Ends]  # of the object in a tokenizer.json
# Pre-tokenizers that keep every character.
_LOSSLESS = ("ByteLevel", "Split", "Digits", "Punctuation")
# The characters that stand for bytes in byte-level vocabularies, as in GPT-2's encoder.py: bytes
# that are printable in Latin-1 stand for themselves, the others are counted up from U+0100.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(b): b for b in _PRINTABLE}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()], np.uint32)
_MAX_TOKEN_BYTES = np.iinfo(np.uint16).max  # counted for one token


class HFTokenizer(Tokenizer):
    """A tokenizer.json, read by the `tokenizers` library.

    Kind "bpe": byte-level BPE, exact: any bytes come back, and each token stands for a fixed number
    of bytes. Bytes that are not UTF-8, which the library does not take, become their one-byte
    tokens; the text between them is encoded piece by piece.

    Kind "library": any tokenizer. Bytes that are not UTF-8 become U+FFFD, and the bytes a token
    stands for follow from its place in the document (`encode_with_bytes`).

    Special tokens are never found in text: `<|endoftext|>` in a document is text like any other.
    """

    _bytes: list[bytes] | None = None  # of each token, by id, of kind "bpe"

    def __init__(self, content: Json, kind: str = "bpe", ends: EndsOf | None = None) -> None:
        """content: the object in a tokenizer.json, or in what `to_json` wrote.

        ends: finds the ends; by default those that `to_json` wrote, else by name. Raises UserError
        for what is no tokenizer.json, not exact (kind "bpe"), or has unknown ends.
        """
        if "file" in content and "kind" in content:
            separator, start = content.get("separator"), content.get("start")
            content = content["file"]
            if not isinstance(content, dict):
                raise UserError("is no tokenizer.json (its file is no object)")
            if ends is None and separator and start:
                ends = lambda _: Ends(separator, start)  # noqa: E731
        self.kind, self.content = kind, {**content, "truncation": None, "padding": None}
        self._library = _opened(self.content)
        self.ends = (ends or find_ends_by_name)(self.content)
        if any(end not in special(self.content) for end in self.ends[:2]):
            self._make_ends_special()
        self._library.encode_special_tokens = True  # as text
        ids, model = special(self.content), self.content["model"]
        self.separator, self.start = ids[self.ends.separator], ids[self.ends.start]
        if kind == "bpe":
            self._read_token_bytes()
        elif model.get("dropout"):
            raise UserError("gives a text other tokens every time (model.dropout); put null there")
        else:
            known = self._library.get_vocab(with_added_tokens=True)
            self.vocab_size = max(known.values()) + 1
            by_name = known.get(model.get("unk_token") or "")
            # Of Unigram the id is given. None: there is no unknown token.
            self._unknown = model["unk_id"] if isinstance(model.get("unk_id"), int) else by_name
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        canonical = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:24]
        if not self._ends_are(find_ends_by_name):
            digest += f"-{self.separator}-{self.start}"
        self.fingerprint = f"{kind}-{self.vocab_size}-{digest}"

    @classmethod
    def train(cls, documents: Iterable[bytes], vocab_size: int) -> Self:
        """Byte-level BPE of at most `vocab_size` tokens: separator, 256 bytes, pairs seen twice."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[ends_lib.SEPARATORS[0]],
            initial_alphabet=list(BYTE_OF),
            show_progress=False,
        )
        texts = (piece for document in documents for piece in _pieces(document)[::2])
        library.train_from_iterator(texts, trainer)
        return cls(json.loads(library.to_str()))

    def to_json(self) -> str:
        """A plain tokenizer.json where the ends follow from it, as after `train`."""
        finders = find_ends_by_name, lambda content: ends_lib.find_ends(content, {})
        follow = all(self._ends_are(find) for find in finders)
        if self.kind == "bpe" and follow:
            return json.dumps(self.content, indent=1)
        ends = {} if follow else {"separator": self.ends.separator, "start": self.ends.start}
        return json.dumps({"kind": self.kind, "file": self.content, **ends}, indent=1)

    @property
    def bytes_per_token(self) -> np.ndarray | None:
        return None if self._bytes is None else self._sizes_V.copy()

    def encode(self, text: str | bytes) -> np.ndarray:
        """See `Tokenizer`. Raises UserError where the tokens of kind "bpe" are not the text."""
        if self._bytes is None:
            return self._library_ids(_as_text(text)[0])
        data = as_bytes(text)
        parts = [np.zeros(0, self._dtype)]
        for i, piece in enumerate(_pieces(data)):
            if i % 2:
                parts.append(self._byte_ids[np.frombuffer(as_bytes(piece), np.uint8)])
            elif piece:
                parts.append(self._library_ids(piece))
        ids_T = np.concatenate(parts).astype(self._dtype, copy=False)
        if (n_bytes := int(self._sizes_V[ids_T].sum(dtype=np.int64))) != len(data):
            found = f"the tokens of a document of {len(data)} bytes stand for {n_bytes}"
            raise UserError(f"data.tokenizer_file: {found}; it is not exact, use another file")
        return ids_T

    def _library_ids(self, text: str) -> np.ndarray:
        # A batch of one: the only call that does not track each token's place in the text.
        found = self._library.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.asarray(found.ids, self._dtype)

    def encode_with_bytes(self, document: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """For kind "library"; see `Tokenizer`.

        White space that no token covers counts for the next one. Other uncovered characters, and
        those of an unknown token, count for none: the sum is then below the document's size.
        """
        text, code_C = _as_text(document)
        found = self._library.encode_batch([text], add_special_tokens=False)[0]
        ids_T = np.asarray(found.ids, self._dtype)
        spans_T2 = np.asarray(found.offsets, np.int64).reshape(-1, 2)
        unknown_T = np.zeros(len(ids_T), bool) if self._unknown is None else ids_T == self._unknown
        counted_C = _covered(spans_T2[~unknown_T], len(code_C)) | np.isin(code_C, _SPACES)
        counted_C &= ~_covered(spans_T2[unknown_T], len(code_C))
        n_bytes_C = 1 + np.sum([code_C >= limit for limit in (0x80, 0x800, 0x10000)], axis=0)
        n_bytes_C[(code_C >= 0xDC80) & (code_C <= 0xDCFF)] = 1  # a byte that is not UTF-8
        before_C = np.append(0, np.cumsum(n_bytes_C * counted_C))
        ends_T = np.maximum.accumulate(spans_T2[:, 1])
        sizes = np.diff(before_C[np.concatenate([[0], ends_T, [len(code_C)]])])
        return ids_T, np.minimum(sizes, _MAX_TOKEN_BYTES).astype(np.uint16)

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """Exact for kind "bpe", else what the library writes; special tokens are dropped."""
        known = known_ids(ids, self.vocab_size).tolist()
        if self._bytes is None:
            return self._library.decode(known, skip_special_tokens=True).encode()
        return b"".join([self._bytes[i] for i in known])

    def _ends_are(self, find: EndsOf) -> bool:
        try:
            return find(self.content)[:2] == self.ends[:2]
        except UserError:
            return False

    def _make_ends_special(self) -> None:
        """The library finds other added tokens in text, where an end would cut a document."""
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        given = {token["content"]: token for token in added_tokens(self.content)}
        plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
        for end in self.ends[:2]:
            known = given.get(end, {"id": vocabulary[end], "content": end})
            given[end] = {**plain, **known, "special": True}
        self.content["added_tokens"] = sorted(given.values(), key=lambda token: token["id"])
        self._library = _opened(self.content)

    def _read_token_bytes(self) -> None:
        """Sets what kind "bpe" needs. Raises UserError where the file is not exact."""
        explicit = json.loads(self._library.to_str())  # with every default
        _check_exact(explicit)
        vocabulary = self._library.get_vocab(with_added_tokens=False)
        self._bytes = _token_bytes(explicit["added_tokens"], vocabulary)
        self.vocab_size = len(self._bytes)
        by_byte = {token[0]: i for i, token in enumerate(self._bytes) if len(token) == 1}
        if missing := set(range(256)) - by_byte.keys():
            raise UserError(f"has no token for the byte {min(missing):#04x}, which a text may have")
        # The library renumbers added tokens behind a hole.
        for token in added_tokens(self.content):
            if self._library.token_to_id(token["content"]) != token["id"]:
                where = f"gives its added token {token['content']!r} the id {token['id']}"
                raise UserError(f"{where}, with ids left out before it")
        self._byte_ids = np.array([by_byte[b] for b in range(256)])
        self._sizes_V = np.array([len(token) for token in self._bytes], np.int32)


def _opened(content: Json) -> Any:
    """The library's tokenizer. Raises UserError where it takes no such file."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # a panic in the library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise UserError(f"is no tokenizer.json ({' '.join(str(error).split())})") from error


def _pieces(data: bytes) -> list[str]:
    """Text at even indices; at odd ones runs of bytes that are not UTF-8, as lone surrogates."""
    try:
        return [data.decode()]
    except UnicodeDecodeError:
        return re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))


def _check_exact(content: dict[str, Any]) -> None:
    """Raises UserError where encoding alters the text or depends on chance."""
    model, steps = content["model"], list(steps_of(content["pre_tokenizer"]))
    if model["type"] != "BPE":
        raise UserError(f"is not byte-level BPE (its model is {model['type']})")
    if sum(step["type"] == "ByteLevel" for step in steps) != 1:
        raise UserError("is not byte-level BPE (its pre_tokenizer has no ByteLevel, or several)")
    for step in steps:
        removes = step["type"] not in _LOSSLESS or step.get("behavior") == "Removed"
        if removes or step.get("add_prefix_space"):
            found = f"pre_tokenizer {json.dumps(step)} adds or drops characters"
            raise UserError(f"does not give back its text ({found})")
    if content["normalizer"] is not None:
        raise UserError("does not give back its text (it has a normalizer; put null in its place)")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            found = f"model.{name} is {model[name]!r}; put null there"
            raise UserError(f"does not give back its text alike every time ({found})")


def steps_of(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, sequences unpacked."""
    if isinstance(step, dict) and step.get("type") == "Sequence":
        for inner in (*(step.get("pretokenizers") or ()), *(step.get("normalizers") or ())):
            yield from steps_of(inner)
    elif isinstance(step, dict):
        yield step


def _token_bytes(added: list[dict[str, Any]], vocabulary: dict[str, int]) -> list[bytes]:
    """By id the bytes that each token stands for; special tokens stand for none."""
    found: dict[int, bytes] = {token["id"]: b"" for token in added if token["special"]}
    plain = [token for token in added if not token["special"]]
    if strips := [token["content"] for token in plain if token["lstrip"] or token["rstrip"]]:
        raise UserError(f"does not give back its text (token {strips[0]!r} takes spaces beside it)")
    named = {token["content"]: (token["id"], token["content"].encode()) for token in plain}
    for token, i in sorted(vocabulary.items()):
        if token not in named and i not in found:
            if not BYTE_OF.keys() >= set(token):
                raise UserError(f"is not byte-level BPE (its token {token!r} stands for no bytes)")
            named[token] = i, bytes(BYTE_OF[c] for c in token)
    for token, (i, data) in named.items():
        if found.setdefault(i, data) != data:
            raise UserError(f"has two tokens of the id {i}, one of them {token!r}")
    return [found.get(i, b"") for i in range(max(found, default=-1) + 1)]


def _as_text(document: str | bytes) -> tuple[str, np.ndarray]:
    """(text for the library, uint32 [C]: its characters, invalid bytes as lone surrogates)."""
    if isinstance(document, bytes):
        document = document.decode("utf-8", "surrogateescape")
    code_C = np.frombuffer(document.encode("utf-32-le", "surrogatepass"), np.uint32)
    if (code_C >> 11 == 0xD800 >> 11).any():
        document = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", document)
    return document, code_C


def _covered(spans_T2: np.ndarray, length: int) -> np.ndarray:
    """bool [length]: which characters lie in a span."""
    starts, ends = (np.bincount(column, minlength=length + 1) for column in spans_T2.T)
    return np.cumsum((starts - ends)[:length]) > 0
