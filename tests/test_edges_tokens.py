"""Bytes that tokens stand for, and tokens that begin and end documents, of tokenizers as users bring them."""

from __future__ import annotations

import json

import pytest
from exchange_runs import LLAMA, config_of, exported, run_of
from tokenizer_files import sentencepiece_like

from uoe_jax.config import from_dict, to_dict
from uoe_jax.data import pipeline
from uoe_jax.data.rows import PackedRows
from uoe_jax.data.store import TokenStore
from uoe_jax.data.tokenizers.ends import find_ends
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer, stored
from uoe_jax.errors import ConfigError, UserError

TEXT = "the cat sat on the mat,  and the other cat sat there too.\nThe end of the cats "


def special(*names: str, first: int = 0) -> list[dict]:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return [dict(plain, id=first + i, content=name) for i, name in enumerate(names)]


def made(model, pre_tokenizer=None, decoder=None, normalizer=None, unknown="[UNK]") -> dict:
    """A tokenizer.json trained on TEXT, with [UNK] and </s>."""
    from tokenizers import Tokenizer, trainers

    library = Tokenizer(model)
    for name, part in (
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
        ("normalizer", normalizer),
    ):
        if part is not None:
            setattr(library, name, part)
    kind, tokens = type(model).__name__, [unknown, "</s>"]
    more = dict(unk_token=unknown) if kind == "Unigram" else {}
    more |= dict(end_of_word_suffix="</w>") if getattr(model, "end_of_word_suffix", None) else {}
    size = dict(vocab_size=60) if kind != "WordLevel" else {}
    library.train_from_iterator([TEXT], getattr(trainers, f"{kind}Trainer" if kind != "BPE" else "BpeTrainer")(special_tokens=tokens, show_progress=False, **size, **more))  # fmt: skip
    return json.loads(library.to_str())


def kinds() -> dict[str, dict]:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    whitespace, metaspace = pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()
    return {
        "WordPiece": made(models.WordPiece(unk_token="[UNK]"), whitespace, decoders.WordPiece()),
        "BPE with an end of word": made(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"), whitespace, decoders.BPEDecoder()),
        "WordLevel": made(models.WordLevel(unk_token="[UNK]"), whitespace),
        "Unigram": made(models.Unigram(), metaspace, decoders.Metaspace()),
        "BPE with marks of spaces": made(models.BPE(unk_token="[UNK]"), metaspace, decoders.Metaspace()),
        "in small letters": made(models.WordPiece(unk_token="[UNK]"), whitespace, decoders.WordPiece(), normalizers.BertNormalizer()),
    }  # fmt: skip


KINDS = kinds()


def rows_of(content: dict, documents: list[str], place) -> PackedRows:
    tokenizer = HFTokenizer(content, "library")
    TokenStore.write(documents, tokenizer, place)
    store = TokenStore.open(place)
    return PackedRows(store, 16, 1, tokenizer)


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_of_tokens_are_those_of_the_documents(name, tmp_path):
    documents = [TEXT, "the cat ", " ", "", "  the\n\n cat \n"]
    rows = rows_of(KINDS[name], documents, tmp_path)
    assert sum(int(rows[i]["n_bytes"]) for i in range(len(rows))) == sum(map(len, documents))
    assert len({int(rows[i]["n_bytes"]) for i in range(len(rows))}) > 1  # by row, not shared out


def test_characters_of_several_bytes_and_bytes_that_are_no_text(tmp_path):
    tokenizer = HFTokenizer(sentencepiece_like(), "library")
    for document in ("thé cät 🐍 at".encode(), b"the \xff\xfe cat", "日本 the".encode()[1:], b""):
        ids, sizes = tokenizer.encode_with_bytes(document)
        assert int(sizes.sum()) == len(document) and len(sizes) == len(ids) + 1
        assert ids.tolist() == tokenizer.encode(document).tolist()


def test_what_a_tokenizer_does_not_know_makes_bits_per_byte_unknown(tmp_path):
    (tmp_path / "store").mkdir()
    rows = rows_of(KINDS["WordLevel"], ["the cat", "the cät sat"], tmp_path / "store")
    assert {int(rows[i]["n_bytes"]) for i in range(len(rows))} == {0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(KINDS["WordLevel"]))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"the cät {i}"}) + "\n" for i in range(99))
    )
    data = dict(
        source="text",
        path=f"{tmp_path}/a.jsonl",
        tokenizer="library",
        tokenizer_file=f"{tmp_path}/tokenizer.json",
    )
    config = from_dict({"model": {"context_length": 64}, "data": data | {"held_out": 30}})
    said = pipeline.load(config, tmp_path / "cache").record["bits_per_byte"]
    assert said.startswith(
        "not reported for train, validation, test: the tokens of document 0 stand for "
    )


def test_characters_that_are_dropped_count_for_nothing(tmp_path):
    from tokenizers import models, pre_tokenizers

    content = made(
        models.WordLevel(unk_token="[UNK]"),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(",", "removed"), pre_tokenizers.Whitespace()]
        ),
    )
    ids, sizes = HFTokenizer(content, "library").encode_with_bytes("the mat,and")
    assert int(sizes.sum()) == len("the mat,and") - 1


# --- the ends of documents ------------------------------------------------------------------------------------------


def content(*names: str, **more) -> dict:
    return dict(
        added_tokens=special(*names, first=2),
        model=dict(type="BPE", vocab={"a": 0, "b": 1}),
        **more,
    )


def template(*front: str, back: tuple[str, ...] = ()) -> dict:
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in front] + [
        {"Sequence": {"id": "A", "type_id": 0}}
    ]
    return {
        "type": "TemplateProcessing",
        "single": single + [{"SpecialToken": {"id": t, "type_id": 0}} for t in back],
    }


LLAMA_LIKE = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 2 to 7
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
ENDS = {  # tokenizer.json, the files beside it: (separator, start)
    "the model's own end": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=4, bos_token_id=3)}, ("</s>", "<s>")),
    "no start": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=4, bos_token_id=None)}, ("</s>", "</s>")),
    "no start, nothing said of it": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=5)}, ("<|endoftext|>", "<|endoftext|>")),
    "one of several ends": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=[5, 7], bos_token_id=3)}, ("<|endoftext|>", "<s>")),
    "the end of generation": (content(*LLAMA_LIKE), {"config.json": {}, "generation_config.json": dict(eos_token_id=4)}, ("</s>", "</s>")),
    "the end by its text": (content(*LLAMA_LIKE), {"tokenizer_config.json": dict(eos_token="</s>")}, ("</s>", "</s>")),
    "the end as an object": (content(*LLAMA_LIKE), {"special_tokens_map.json": dict(eos_token=dict(content="</s>"))}, ("</s>", "</s>")),
    "a start that is not put in front": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=4, bos_token_id=3), "tokenizer_config.json": dict(add_bos_token=False, bos_token="<s>")}, ("</s>", "</s>")),
    "a start that the class puts in front": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=4), "tokenizer_config.json": dict(tokenizer_class="LlamaTokenizerFast", bos_token=dict(content="<s>"))}, ("</s>", "<s>")),
    "a start that the model's class puts in front": (content(*LLAMA_LIKE), {"config.json": dict(model_type="llama", eos_token_id=4, bos_token_id=3), "tokenizer_config.json": dict(bos_token="<s>")}, ("</s>", "<s>")),
    "a key that its class does not go by": (content(*LLAMA_LIKE, post_processor=template("<s>")), {"tokenizer_config.json": dict(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False, eos_token="</s>")}, ("</s>", "<s>")),
    "a key that its class goes by": (content(*LLAMA_LIKE, post_processor=template("<s>")), {"tokenizer_config.json": dict(tokenizer_class="LlamaTokenizer", add_bos_token=False, eos_token="</s>")}, ("</s>", "</s>")),
    "a start that another class does not": (content(*LLAMA_LIKE), {"config.json": dict(eos_token_id=7, bos_token_id=6), "tokenizer_config.json": dict(tokenizer_class="GPT2Tokenizer", bos_token="<|im_start|>")}, ("<|im_end|>", "<|im_end|>")),
    "what the post-processor does": (content(*LLAMA_LIKE, post_processor={"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<s>")]}), {"config.json": dict(eos_token_id=5, bos_token_id=5)}, ("<|endoftext|>", "<s>")),
    "both by the post-processor": (content(*LLAMA_LIKE, post_processor=template("<s>", back=("<|im_end|>",))), {}, ("<|im_end|>", "<s>")),
    "as RoBERTa has it": (content(*LLAMA_LIKE, post_processor={"type": "RobertaProcessing", "cls": ["<s>", 3], "sep": ["</s>", 4]}), {}, ("</s>", "<s>")),
    "DeepSeek": (content(*DEEPSEEK), {"config.json": dict(eos_token_id=3, bos_token_id=2), "tokenizer_config.json": dict(add_bos_token=True, bos_token=dict(content=DEEPSEEK[0]))}, DEEPSEEK[::-1]),
    "DeepSeek by name": (content(*DEEPSEEK), {}, DEEPSEEK[::-1]),
    "names, where no file says": (content(*LLAMA_LIKE), {}, ("<|endoftext|>", "<s>")),
    "our own config.json beside it": (content("</s>", "<s>"), {"config.json": {"model": {}, "data": {}}}, ("</s>", "<s>")),
    "ids that are none": (content("<|endoftext|>"), {"config.json": dict(eos_token_id=[[2]], bos_token_id=True), "tokenizer_config.json": dict(eos_token=dict(content=["</s>"]))}, ("<|endoftext|>", "<|endoftext|>")),
    "an id that is no special token": (content("<|endoftext|>"), {"config.json": dict(eos_token_id=1, bos_token_id=99)}, ("<|endoftext|>", "<|endoftext|>")),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_documents_are_what_the_files_say(name):
    tokenizer, files, wanted = ENDS[name]
    found = find_ends(tokenizer, files)
    assert found[:2] == wanted
    assert bool(found.notes) == (name in ("an id that is no special token", "ids that are none"))
    assert find_ends(tokenizer, files, "b", "a")[:2] == ("b", "a")


def test_ends_that_nothing_says_are_asked_for_by_key():
    with pytest.raises(UserError, match="--config.data.separator"):
        find_ends(content("<x>", "<y>"), {})
    with pytest.raises(UserError, match="has no token '<z>', which data.separator names"):
        find_ends(content("<x>", "<y>"), {}, "<z>")
    with pytest.raises(
        UserError, match="puts <x> <y> in front .* name it with --config.data.start"
    ):
        find_ends(content("<x>", "<y>", "</s>", post_processor=template("<x>", "<y>")), {})
    assert find_ends(content("<x>", "<y>"), {}, "<x>")[:2] == ("<x>", "<x>")
    found = find_ends(
        content(*LLAMA_LIKE),
        {
            "config.json": dict(eos_token_id=4),
            "tokenizer_config.json": dict(eos_token="<|im_end|>"),
        },
    )
    assert found.notes == (
        "tokenizer_config.json has eos_token='<|im_end|>'; documents end with '</s>'",
    )


@pytest.mark.parametrize("kind", ["bpe", "library"])
def test_ends_stay_with_a_tokenizer_that_is_kept(kind, tmp_path):
    content = json.loads(HFTokenizer.train([b"abc abc"] * 9, 270).to_json())
    n = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"] += special("</s>", "<s>", first=n) + [
        dict(special("<e>", first=n + 2)[0], special=False)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    plain = load_tokenizer(kind, f"{tmp_path}/tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=n + 2)))
    found = load_tokenizer(kind, f"{tmp_path}/tokenizer.json")
    assert (plain.separator, plain.start) == (0, n + 1) and (found.separator, found.start) == (
        n + 2,
        n + 2,
    )
    assert plain.fingerprint != found.fingerprint and found.vocab_size == n + 3
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "tokenizer.json").write_text(found.to_json())
    for again in (stored(found.to_json()), load_tokenizer(kind, f"{tmp_path}/kept/tokenizer.json")):
        assert (again.separator, again.start, again.fingerprint) == (
            found.separator,
            found.start,
            found.fingerprint,
        )
        assert n + 2 not in again.encode("abc<e>abc")  # text like any other
    with pytest.raises(
        ConfigError, match="config.data.separator='</s>': is of no use with data.tokenizer='bytes'"
    ):
        load_tokenizer("bytes", "", "</s>")


def test_a_start_that_is_named_is_kept_where_several_are_in_front(tmp_path):
    content = json.loads(HFTokenizer.train([b"abc abc"] * 9, 270).to_json())
    n = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"] += special("<s>", "<x>", first=n)
    content["post_processor"] = template("<s>", "<x>") | {"pair": [], "special_tokens": {
        name: {"id": name, "ids": [n + i], "tokens": [name]} for i, name in enumerate(("<s>", "<x>"))}}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = load_tokenizer("bpe", f"{tmp_path}/tokenizer.json", "", "<x>")
    assert (found.separator, found.start) == (0, n + 1) and stored(
        found.to_json()
    ).fingerprint == found.fingerprint


def test_a_tokenizer_that_draws_its_tokens_is_refused():
    content = json.loads(HFTokenizer.train([b"abc abc"] * 9, 270).to_json())
    content["model"]["dropout"] = 0.5
    with pytest.raises(UserError, match="other tokens every time .model.dropout."):
        HFTokenizer(content, "library")


def test_an_exported_tokenizer_puts_the_start_in_front(tmp_path, capsys):
    """Of our own, and of an imported model that has none in front; the tokens are those that `uoe generate` begins with."""
    import tokenizers

    config = config_of(**LLAMA | dict(n_layers=1))
    run_of(config, tmp_path / "run")
    assert exported(tmp_path / "run", tmp_path / "hf") == 0
    assert tokenizers.Tokenizer.from_file(f"{tmp_path}/hf/tokenizer.json").encode("Onçe").ids == [
        256,
        *"Onçe".encode(),
    ]
    bpe = HFTokenizer.train([b"def f(x):\n    return x\n"] * 20, 280)
    source = tmp_path / "run" / "source"
    source.mkdir()
    for place in (source, tmp_path / "run"):
        (place / "tokenizer.json").write_text(bpe.to_json())
    settings = dict(tokenizer_class="GPT2Tokenizer", add_bos_token=False, pad_token="<|endoftext|>")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(to_dict(config) | {"data": {"tokenizer": "bpe"}})
    )
    capsys.readouterr()
    assert exported(tmp_path / "run", tmp_path / "out") == 0
    assert (
        "tokenizer.json puts '<|endoftext|>' alone in front of a text now"
        in capsys.readouterr().err
    )
    found = tokenizers.Tokenizer.from_file(f"{tmp_path}/out/tokenizer.json").encode("def g").ids
    assert found == [bpe.start, *bpe.encode("def g").tolist()]
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (
        settings["bos_token"] == settings["pad_token"] == "<|endoftext|>"
        and "add_bos_token" not in settings
    )
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
