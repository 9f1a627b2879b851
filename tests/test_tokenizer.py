"""Tokenizers: exact bytes, the same vocabulary in every process, words by frequency, and files that are no tokenizers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import TINY, environment, write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import sentencepiece_like

from uoe_jax import cli
from uoe_jax.data.rows import PackedRows
from uoe_jax.data.store import TokenStore
from uoe_jax.data.tokenizers import words as vocabulary
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer, stored
from uoe_jax.data.tokenizers.words import WordTokenizer
from uoe_jax.errors import ConfigError, UserError

PROSE = [
    b"The cat sat on the mat, and the cat's mat sat there.\n" * 3,
    "def naïve(x):\r\n    return '日本語 🐍' + x\n".encode() * 2,
    b"latin-1: Zo\xeb, and the rest of the cat sat.",
    b"",
]
BPE = HFTokenizer.train(PROSE, 300)
AWKWARD = {
    "empty": b"",
    "emoji": "👩‍👩‍👧‍👦 🐍e\u0301é".encode(),
    "line ends": b"a\r\nb\rc\n\n\x0b\x0c\x1a",
    "NUL": b"\x00a\x00\x00",
    "every byte": bytes(range(256)) * 2,
    "special text": b"the <|endoftext|> of<|endoftext|>the cat",
    "one long word": b"cat" * 350_000,
    "long and not UTF-8": b"\xff\xfe" * 50_000 + "é".encode(),
    "half a character": "日本".encode()[:-1],
    "a surrogate in UTF-8": b"a\xed\xa0\x80b",
}


def picture(byte: int) -> str:
    """The character for a byte in byte-level vocabularies: itself where Latin-1 has a picture, else the next from U+0100."""
    shown = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
    return (
        chr(byte)
        if byte in shown
        else chr(256 + [b for b in range(256) if b not in shown].index(byte))
    )


def by_hand(merges: list[tuple[bytes, bytes]], **changes) -> dict:
    """A tokenizer.json: 256 bytes, then what the merges make, then the separator; no regular expression."""
    pictured = lambda data: "".join(picture(b) for b in data)  # noqa: E731
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    vocab = {pictured(token): i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [added(len(vocab), "<|endoftext|>")],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [f"{pictured(a)} {pictured(b)}" for a, b in merges],
        },
    } | changes


def added(i: int, text: str, special: bool = True, **more) -> dict:
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"id": i, "content": text, "special": special, **flags, **more}


MERGES = [
    (b"a", b"b"),
    (b"ab", b"c"),
    (b" ", b"ab"),
    (b"\xc3", b"\xa9"),
    (b"c", b"c"),
    (b"b", b"c"),
]


BY_HAND = HFTokenizer(by_hand(MERGES))


def merged_by_hand(data: bytes) -> list[bytes]:
    """Byte-pair encoding as it is defined: the earliest merge that applies, leftmost first, until none does."""
    tokens = [bytes([b]) for b in data]
    while True:
        found = [
            (MERGES.index(pair), i)
            for i, pair in enumerate(zip(tokens, tokens[1:]))
            if pair in MERGES
        ]
        if not found:
            return tokens
        _, i = min(found)
        tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]


# ---- pieces of words ----------------------------------------------------------------------------------------------


def assert_exact(tokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.bytes_per_token[ids].sum() == len(data)
    assert tokenizer.separator not in ids and ids.dtype == np.min_scalar_type(
        tokenizer.vocab_size - 1
    )


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass")),
    )
)
def test_bpe_gives_back_any_bytes_and_counts_them(data):
    assert_exact(BPE, data)


@pytest.mark.parametrize("name", AWKWARD)
def test_bpe_gives_back_awkward_bytes_and_counts_them(name):
    assert_exact(BPE, AWKWARD[name])


@given(
    st.lists(
        st.sampled_from([b"a", b"b", b"c", b" ", "é".encode(), b"\xc3", b"x"]), max_size=30
    ).map(b"".join)
)
def test_bpe_merges_as_defined(data):
    tokenizer = BY_HAND
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in MERGES]
    if b"\xc3" in data.replace(
        "é".encode(), b""
    ):  # not UTF-8: what is around it is encoded on its own
        assert_exact(tokenizer, data)
    else:
        assert [tokens[i] for i in tokenizer.encode(data)] == merged_by_hand(data)


def test_bpe_finds_the_commonest_pairs_first():
    # "xy" 6 times, then " xy" 5 times, then " xyz" and " q" 3 times each; then nothing occurs twice.
    tokenizer = HFTokenizer.train([b"xyz xyz xyz xyz xy xy", b"q q q q"], 1000)
    assert tokenizer.vocab_size == 257 + 4
    new = [tokenizer.decode_bytes([i]) for i in range(257, 261)]
    assert new[:2] == [b"xy", b" xy"] and set(new[2:]) == {b" xyz", b" q"}


def test_bpe_of_a_str_is_that_of_its_utf8_and_text_decodes_with_replacements():
    assert BPE.encode("naïve 🐍").tolist() == BPE.encode("naïve 🐍".encode()).tolist()
    assert BPE.encode("Zo\udceb").tolist() == BPE.encode(b"Zo\xeb").tolist()
    assert BPE.decode(BPE.encode(b"Zo\xeb\n")) == "Zo\ufffd\n"
    assert BPE.decode([*BPE.encode("a"), BPE.separator, *BPE.encode("b")]) == "ab"
    for outside in ([BPE.vocab_size], [-1]):
        with pytest.raises(ValueError, match=str(BPE.vocab_size)):
            BPE.decode_bytes(outside)


def test_bpe_trained_elsewhere_keeps_its_ids_and_never_finds_special_tokens_in_text():
    content = by_hand(MERGES)
    n = 256 + len(MERGES)
    content["added_tokens"] += [added(n + 1, "<pad>"), added(n + 2, "    ", special=False)]
    tokenizer = HFTokenizer(content)
    assert (tokenizer.vocab_size, tokenizer.separator) == (n + 3, n)
    assert tokenizer.encode(b"abc    x").tolist() == [257, n + 2, ord("x")]
    assert tokenizer.bytes_per_token[n:].tolist() == [0, 0, 4]
    assert_exact(tokenizer, b"<pad>abc<|endoftext|>")
    assert tokenizer.decode_bytes([n, 256, n + 1, n + 2]) == b"ab    "


@pytest.mark.parametrize(
    "names,found",
    [
        (["<pad>", "<|endoftext|>", "</s>"], "<|endoftext|>"),
        (["</s>", "<|end_of_text|>"], "<|end_of_text|>"),
        (["<stop>"], "<stop>"),
        (["<s>", "</s>", "<mask>"], "</s>"),
    ],
)
def test_the_separator_is_found_by_name_or_is_the_only_special_token(names, found):
    ids = {name: 256 + i for i, name in enumerate(names)}
    tokenizer = HFTokenizer(by_hand([], added_tokens=[added(i, name) for name, i in ids.items()]))
    assert tokenizer.separator == ids[found]


def changed(section: str, **values) -> dict:
    content = by_hand(MERGES)
    return content | {section: content[section] | values}


BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def in_sequence(*steps: dict) -> dict:
    return by_hand(
        MERGES, pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}
    )


def split(behavior: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": behavior, "invert": False}


REFUSED = {
    "words": (
        by_hand([], model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
        "WordLevel",
    ),
    "no ByteLevel": (by_hand(MERGES, pre_tokenizer=None), "no ByteLevel"),
    "spaces": (by_hand(MERGES, pre_tokenizer={"type": "WhitespaceSplit"}), "no ByteLevel"),
    "drops": (in_sequence(split("Removed")), "drops characters"),
    "drops spaces": (in_sequence({"type": "WhitespaceSplit"}), "drops characters"),
    "prefix": (changed("pre_tokenizer", add_prefix_space=True), "adds or drops"),
    "normalizer": (by_hand(MERGES, normalizer={"type": "NFC"}), "normalizer"),
    "dropout": (changed("model", dropout=0.1), "dropout"),
    "end of word": (changed("model", end_of_word_suffix="</w>", merges=[]), "end_of_word_suffix"),
    "no bytes": (changed("model", vocab={"▁the": 0}, merges=[]), "▁the"),
    "bytes are missing": (changed("model", vocab={"a": 0, "b": 1}, merges=[]), "0x00"),
    "no separator": (by_hand(MERGES, added_tokens=[]), "none"),
    "which separator": (
        by_hand([], added_tokens=[added(256, "<a>"), added(257, "<b>")]),
        "<a>, <b>",
    ),
    "strips": (
        by_hand(
            [], added_tokens=[added(256, "</s>"), added(257, "<b>", special=False, lstrip=True)]
        ),
        "'<b>'",
    ),
    "two of one id": (
        changed("model", vocab={picture(b): b // 2 for b in range(256)}, merges=[]),
        "two tokens",
    ),
    "a hole": (
        by_hand([], added_tokens=[added(256, "</s>"), added(258, "<b>")]),
        "'<b>' the id 258",
    ),
    "nothing": ({}, "tokenizer.json"),
    "no vocabulary": (by_hand([], model={"type": "BPE"}), "tokenizer.json"),
    "merge of what is not there": (changed("model", merges=["q z"]), "tokenizer.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_byte_level_bpe_is_refused_with_the_reason(tmp_path, name):
    content, reason = REFUSED[name]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_tokenizer("bpe", str(file))
    said = str(caught.value)
    assert "config.data.tokenizer_file" in said and str(file) in said and reason in said, said
    assert "uoe tokenizer train" in said and "\n" not in said


@pytest.mark.parametrize("behavior", ["Isolated", "MergedWithPrevious", "Contiguous"])
def test_other_cuts_into_words_are_exact_too(behavior):
    tokenizer = HFTokenizer(
        in_sequence(split(behavior), {"type": "Digits", "individual_digits": True})
    )
    for data in [*PROSE, *(AWKWARD[name] for name in AWKWARD if "long" not in name)]:
        assert_exact(tokenizer, data)


def test_tokens_that_do_not_stand_for_the_text_are_noticed():
    content = by_hand(
        MERGES
    )  # a special token that is also what merges make: it would stand for no bytes
    content["added_tokens"].append(added(256, "ab"))
    with pytest.raises(UserError, match="document of 4 bytes stand for 2"):
        HFTokenizer(content).encode(b"xaby")


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "null", '"text"', "\xff", "[" * 100_000])
def test_files_that_are_no_tokenizer_are_named_with_the_remedy(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    for path in (file, tmp_path, ""):
        with pytest.raises(ConfigError, match="config.data.tokenizer_file=.*uoe tokenizer train"):
            load_tokenizer("bpe", str(path))


def test_a_file_without_a_use_is_refused_and_the_other_kinds_need_none():
    assert load_tokenizer("bytes", "").fingerprint == ByteTokenizer.fingerprint
    assert load_tokenizer("words", "") is None
    for kind in ("bytes", "words"):
        with pytest.raises(ConfigError, match="config.data.tokenizer_file='t.json'.*'bpe'"):
            load_tokenizer(kind, "t.json")


# ---- words --------------------------------------------------------------------------------------------------------


def tokens_by_hand(text: str) -> list[str]:
    """As the Transformer-XL harness has it: what is between spaces, and `<eos>` for every newline."""
    lines = text.split("\n")
    ended = [[*(w for w in line.split(" ") if w), "<eos>"] for line in lines]
    return [token for line in ended for token in line][:-1]


def names(tokenizer: WordTokenizer) -> list[str]:
    """The vocabulary by id, the separator as <sep>."""
    return [
        "<sep>" if i == tokenizer.separator else tokenizer.decode([i]).replace("\n", "<eos>")
        for i in range(tokenizer.vocab_size)
    ]


def test_words_are_most_frequent_first_and_ties_go_by_the_word():
    tokenizer = WordTokenizer.train([b"b a c b a\nb rare once\n", b"c d d\nb b b\n"], min_count=2)
    # b 6; <eos> 4; then 2 each: the separator, which is the empty word, <unk> (rare, once), a, c, d
    assert names(tokenizer) == ["b", "<eos>", "<sep>", "<unk>", "a", "c", "d"]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("d once a")] == ["d", "<unk>", "a"]


text_of_words = st.lists(
    st.sampled_from(["a", "bb", "é", "<unk>", "x\ty", "r\r", " ", "\n"]), max_size=40
).map("".join)


@given(st.lists(text_of_words, min_size=1, max_size=5), st.integers(1, 4))
def test_words_agree_with_the_reference(texts, min_count):
    counts = Counter(token for text in texts for token in tokens_by_hand(text))
    special = {
        "<eos>": counts.pop("<eos>", 0),
        "<unk>": counts.pop("<unk>", 0),
        "<sep>": len(texts),
    }
    kept = {word: n for word, n in counts.items() if n >= min_count}
    special["<unk>"] += counts.total() - sum(kept.values())
    documents = [text.encode() for text in texts]
    if not kept:
        with pytest.raises(ConfigError, match=f"config.data.min_count={min_count}"):
            WordTokenizer.train(documents, min_count)
        return
    tokenizer = WordTokenizer.train(documents, min_count)
    known = names(tokenizer)
    frequency = kept | special
    assert sorted(known) == sorted(frequency)
    assert [frequency[word] for word in known] == sorted(frequency.values(), reverse=True)
    for text in texts:
        expected = [token if token in frequency else "<unk>" for token in tokens_by_hand(text)]
        assert [known[i] for i in tokenizer.encode(text)] == expected


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "bb", "é", "\x00", "\r", "\tq"]), max_size=5), max_size=6
    )
)
def test_text_of_known_words_and_single_spaces_comes_back(lines):
    tokenizer = WordTokenizer.train(["a bb é \x00 \r \tq\n".encode()], 1)
    text = "\n".join(" ".join(line) for line in lines)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_bytes(tokenizer.encode(text + " \n")) == (text + "\n").encode()


@pytest.mark.parametrize(
    "document,line_bytes",
    [
        (b"a bb c\n\xc3\xa9 bb\n", 0),  # every word has one byte after it
        (b" = a = \n \n bb bb c \n", 2),  # WikiText: a space on both sides of a line
        (b"a\n\n\nbb\n\n\n", 0),  # 4 newlines have no word before them, of 6: rounded down
        (b"    a\n    bb\n    c d\n", 4),
    ],
)
def test_words_and_line_ends_stand_for_the_bytes_of_the_text(document, line_bytes):
    tokenizer = WordTokenizer.train([document, document], 1)
    size = tokenizer.bytes_per_token
    assert size[tokenizer.encode("\n")].tolist() == [line_bytes] and size[tokenizer.separator] == 0
    assert all(
        size[tokenizer.encode(word)].tolist() == [len(word) + 1] for word in document.split()
    )
    left = len(document) - size[tokenizer.encode(document)].sum()
    assert 0 <= left < document.count(b"\n")
    if line_bytes or b"\n\n" not in document:
        assert left == 0


def test_unknown_words_stand_for_no_bytes_and_a_last_word_for_the_separator_too():
    tokenizer = WordTokenizer.train([b"a a bb bb"], 2)
    count = lambda text: tokenizer.bytes_per_token[tokenizer.encode(text)].sum()  # noqa: E731
    assert (count(b"a bb"), count(b"a unknown bb"), count(b"never seen"), count(b"<unk>")) == (
        5,
        5,
        0,
        0,
    )
    assert tokenizer.decode(tokenizer.encode("a new bb")) == "a <unk> bb"


@pytest.mark.parametrize(
    "min_count,words", [(1, {"a", "bb", "c"}), (2, {"a", "bb"}), (3, {"a"}), (4, None)]
)
def test_min_count_is_how_often_a_word_must_occur(min_count, words):
    documents = [b"a bb a\nc", b"a bb\n\n\n\n\n"]
    if words is None:
        with pytest.raises(ConfigError, match="config.data.min_count=4: no word"):
            WordTokenizer.train(documents, min_count)
    else:
        assert set(names(WordTokenizer.train(documents, min_count))) == words | {
            "<eos>",
            "<sep>",
            "<unk>",
        }


def test_words_that_look_like_special_tokens_are_words_and_so_are_bytes_that_are_not_utf8():
    tokenizer = WordTokenizer.train([b"<eos> <|endoftext|> Zo\xeb \xff"] * 2, 2)
    ids = tokenizer.encode(b"<eos> <|endoftext|> Zo\xeb \xff")
    assert (
        len(set(ids)) == 4
        and tokenizer.separator not in ids
        and tokenizer.encode("\n")[0] not in ids
    )
    again = stored(tokenizer.to_json())
    assert again.decode_bytes(ids) == b"<eos> <|endoftext|> Zo\xeb \xff"
    assert again.encode("Zo\udceb").tolist() == tokenizer.encode(b"Zo\xeb").tolist()
    with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
        tokenizer.decode([tokenizer.vocab_size])


@given(text_of_words, st.integers(1, 9))
def test_long_documents_are_split_in_parts_without_a_trace(text, chunk):
    whole = list(vocabulary.split_words(text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK", chunk)
        parts = list(vocabulary.split_words(text.encode()))
    assert [w for part in parts for w in part] == [w for part in whole for w in part]


def test_words_are_encoded_faster_than_a_million_a_second():
    rng = np.random.default_rng(0)
    words = [b"w%d" % i for i in range(50_000)]
    document = b" ".join(words[i] for i in rng.zipf(1.3, 1_000_000).clip(max=49_999))
    tokenizer = WordTokenizer.train([document, b" ".join(words)], 1)
    took = []
    for _ in range(3):  # the best of them: neighbours on the machine slow down single ones
        started = time.process_time()
        assert len(tokenizer.encode(document)) == 1_000_000
        took.append(time.process_time() - started)
    assert min(took) < 1


# ---- stored -------------------------------------------------------------------------------------------------------


def words_example() -> WordTokenizer:
    return WordTokenizer.train([b"the cat sat\nthe mat"] * 3, 2)


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: BPE, words_example])
def test_a_stored_tokenizer_is_the_same_tokenizer(make):
    one, two = make(), stored(make().to_json())
    for name in ("vocab_size", "separator", "fingerprint", "tokens_are_words"):
        assert getattr(one, name) == getattr(two, name), name
    assert one.tokens_are_words == isinstance(one, WordTokenizer)
    np.testing.assert_array_equal(one.bytes_per_token, two.bytes_per_token)
    assert one.encode("the cat, naïve 🐍\n").tolist() == two.encode("the cat, naïve 🐍\n").tolist()
    assert one.bytes_per_token.dtype == np.int32 and re.fullmatch(r"[a-z0-9-]+", one.fingerprint)


def test_the_tokenizers_library_reads_a_stored_bpe():
    library = tokenizers.Tokenizer.from_str(BPE.to_json())
    assert library.encode("the cat sat 🐍").ids == BPE.encode("the cat sat 🐍").tolist()
    assert library.token_to_id("<|endoftext|>") == BPE.separator


@pytest.mark.parametrize(
    "make", [ByteTokenizer, lambda: HFTokenizer(by_hand(MERGES)), words_example]
)
def test_a_cut_stored_tokenizer_is_refused(make):
    text = make().to_json()
    for end in range(0, len(text), 1 + len(text) // 50):
        with pytest.raises(UserError):
            stored(text[:end])


@pytest.mark.parametrize(
    "change",
    [
        {"words": ["a", "", "\n"]}, {"words": ["a", "a", "", "\n", "<unk>"]}, {"words": [1, "", "\n", "<unk>"]},
        {"line_bytes": -1}, {"line_bytes": None}, {"format": 2}, {"kind": "syllables"}, {"words": None}, {"kind": "bytes"},
    ],
)  # fmt: skip
def test_a_damaged_vocabulary_is_refused(change):
    with pytest.raises(UserError):
        stored(json.dumps(json.loads(words_example().to_json()) | change))


def test_fingerprints_are_of_the_content():
    content = by_hand(MERGES)
    same = [content, dict(reversed(content.items())), content | {"truncation": {"max_length": 4, "strategy": "LongestFirst",
            "stride": 0, "direction": "Right"}}]  # fmt: skip
    assert len({HFTokenizer(c).fingerprint for c in same}) == 1
    assert len(HFTokenizer(same[2]).encode(b"x" * 9)) == 9
    renamed = by_hand(MERGES, added_tokens=[added(262, "</s>")])
    other = [by_hand(MERGES[::-1][2:]), renamed, changed("pre_tokenizer", use_regex=True)]
    assert len({HFTokenizer(c).fingerprint for c in [content, *other]}) == 4
    texts = ([b"a a b"], [b"a b b"], [b"a a c"], [b" a a b \n"])
    assert len({WordTokenizer.train(t, 1).fingerprint for t in texts}) == 4


def test_packed_rows_count_every_byte_of_the_documents():
    ids = [BPE.encode(d) for d in PROSE]
    offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    rows = PackedRows(TokenStore(np.concatenate(ids), offsets), 32, 4, BPE)
    assert sum(int(rows[i]["n_bytes"]) for i in range(len(rows))) == sum(map(len, PROSE))


# ---- uoe tokenizer train ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "files")


def train_command(source: Path, out: Path, vocab: str = "290", *more: str) -> list[str]:
    return [
        "tokenizer",
        "train",
        f"--config={TINY}",
        f"--config.data.path={source}",
        f"--vocab={vocab}",
        f"--out={out}",
        *more,
    ]


def test_fresh_processes_make_the_same_vocabularies(tmp_path, source):
    program = (
        "import sys; from uoe_jax import cli; from uoe_jax.data.tokenizers.hf import HFTokenizer; from uoe_jax.data.tokenizers.words import WordTokenizer; code = cli.main(sys.argv[1:]);"
        "docs = [b'e d c b a e d c b a %d' % (i % 7) for i in range(50)];"
        "print(WordTokenizer.train(docs, 2).fingerprint); sys.exit(code)"
    )
    said = set()
    for seed in ("0", "77"):
        out = tmp_path / seed / "tokenizer.json"
        out.parent.mkdir()
        args = [sys.executable, "-c", program, *train_command(source, out)]
        run = subprocess.run(
            args, env=environment(PYTHONHASHSEED=seed), capture_output=True, text=True, check=True
        )
        assert run.stderr == ""
        said.add((run.stdout.replace(str(out), "OUT"), out.read_bytes()))
    assert len(said) == 1


def test_tokenizer_train_writes_a_file_that_works_and_says_what_comes_next(
    tmp_path, source, capsys
):
    out = tmp_path / "tokenizer.json"
    # The config may ask for the file that is yet to be made.
    command = train_command(
        source, out, "290", "--config.data.tokenizer=bpe", f"--config.data.tokenizer_file={out}"
    )
    assert cli.main(command) == 0
    said, err = capsys.readouterr()
    assert said.count("\n") == 1 and err == ""
    tokenizer = load_tokenizer("bpe", str(out))
    assert tokenizer.vocab_size == 290 and list(tmp_path.iterdir()) == [out]
    from uoe_jax.data import pipeline
    from uoe_jax.data.sources import stdlib

    documents = list(
        stdlib.open_stdlib(str(source), pipeline.default_cache_dir()).documents("validation")
    )
    rate = sum(map(len, documents)) / sum(len(tokenizer.encode(d)) for d in documents)
    assert rate > 1.5 and f"290 tokens, {rate:.3f} bytes each" in said
    for part in (f"uoe train --config={TINY}", f"--config.data.path={source}", "--config.data.tokenizer=bpe",
                 f"--config.data.tokenizer_file={out}", "--workdir="):  # fmt: skip
        assert part in said
    before = out.stat().st_mtime_ns
    assert cli.main(command) == 0  # the same again
    assert out.stat().st_mtime_ns == before
    capsys.readouterr()
    assert cli.main(train_command(source, out, "291")) == 2
    assert f"--out={out}: holds something else already" in capsys.readouterr().err
    assert load_tokenizer("bpe", str(out)).fingerprint == tokenizer.fingerprint


def test_tokenizer_train_says_where_the_text_has_fewer_pairs(tmp_path, source, capsys):
    assert cli.main(train_command(source, tmp_path / "t.json", "999999")) == 0
    said = capsys.readouterr().out
    found = int(re.search(r": (\d+) tokens", said)[1])
    assert 257 < found < 5000 and "no pair left" in said and "--vocab=999999" in said


@pytest.mark.parametrize(
    "change,remedy",
    [
        (["--vocab=256"], "--vocab=256: give a whole number from 257"),
        (["--vocab=1e4"], "--vocab=1e4: give a whole number"),
        (["--vocab=1000001"], "to 1000000"),
        (["--out=/nonexistent/t.json"], "--out=/nonexistent/t.json: is no place for a file"),
        (["--out=/"], "--out=/: is no place for a file"),
        (["--config.data.path=/nonexistent"], "data.path"),
        (["--config.data.tokenizr=bpe"], "config.data.tokenizer"),
    ],
)
def test_tokenizer_train_answers_mistakes_with_one_sentence(
    tmp_path, source, capsys, change, remedy
):
    command = train_command(source, tmp_path / "t.json")
    replaced = {c.partition("=")[0] for c in change}
    assert cli.main([c for c in command if c.partition("=")[0] not in replaced] + change) == 2
    err = capsys.readouterr().err
    assert remedy in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_damage_to_a_tokenizer_file_is_a_sentence_or_still_exact(data):
    content = by_hand(MERGES)
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict) and data.draw(st.booleans()):
        place, key = place[key], data.draw(st.sampled_from(sorted(place[key])))
    place[key] = data.draw(
        st.sampled_from([None, 0, -1, "x", [], {}, [[]], ["a"], True, 1e9, {"type": "x"}])
    )
    try:
        tokenizer = stored(json.dumps(content))
    except UserError:
        return
    assert_exact(tokenizer, b"abc ab\xc3\xa9")


# --- any tokenizer.json ---------------------------------------------------------------------------------------------


def test_any_tokenizer_of_the_library(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(sentencepiece_like()))
    with pytest.raises(ConfigError, match="is not byte-level BPE"):
        load_tokenizer("bpe", str(file))
    tokenizer = load_tokenizer("library", str(file))
    text = "the cat \u00e9\n the"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    assert (tokenizer.start, tokenizer.separator, tokenizer.vocab_size) == (1, 2, 259 + 11)
    assert tokenizer.encode_with_bytes(text)[1].sum() == len(text.encode())
    assert tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert tokenizer.encode(b"\xff the")[0] == tokenizer.encode("\ufffd the")[0]
    assert tokenizer.encode("</s>").tolist() != [2]  # text like any other
    kept = stored(tokenizer.to_json())
    assert kept.fingerprint == tokenizer.fingerprint and kept.encode(text).tolist() == ids.tolist()
    kept_file = tmp_path / "kept.json"
    kept_file.write_text(tokenizer.to_json())
    assert load_tokenizer("library", str(kept_file)).fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match="config.data.tokenizer_file=.*is no tokenizer.json"):
        file.write_text("{}")
        load_tokenizer("library", str(file))


def test_a_document_starts_with_the_token_that_models_of_its_kind_start_with(tmp_path):
    content = json.loads(HFTokenizer.train([b"abc abc"] * 9, 270).to_json())
    n = max(content["model"]["vocab"].values()) + 1
    extra = {**content["added_tokens"][0], "content": "<|begin_of_text|>", "id": n}
    both = HFTokenizer(content | {"added_tokens": [*content["added_tokens"], extra]})
    assert (
        both.start
        == n
        != both.separator
        == HFTokenizer(content).separator
        == HFTokenizer(content).start
    )


def test_a_file_is_opened_once_until_it_or_one_beside_it_changes(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(BPE.to_json())
    first = load_tokenizer("bpe", str(file))
    assert load_tokenizer("bpe", str(file)) is first
    assert load_tokenizer("library", str(file)).fingerprint.startswith("library-")
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    again = load_tokenizer("bpe", str(file))
    assert again is not first and again.fingerprint == first.fingerprint
    file.write_text(HFTokenizer.train([b"other text"] * 3, 260).to_json())
    assert load_tokenizer("bpe", str(file)).vocab_size != first.vocab_size
