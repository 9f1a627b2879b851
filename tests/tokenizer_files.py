"""Tokenizer files of other kinds than our own."""

from __future__ import annotations


def sentencepiece_like() -> dict:
    """As Llama 2 has it: spaces marked, bytes to fall back on, one <s> and one </s>."""
    words = ["\u2581the", "\u2581", "t", "h", "e", "c", "\u2581c", "at", "a", "th", "the"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    vocab |= {word: len(vocab) + i for i, word in enumerate(words)}
    special = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
               for i, name in enumerate(("<unk>", "<s>", "</s>"))]  # fmt: skip
    pieces = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    model = dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=True,
                 byte_fallback=True, vocab=vocab, merges=["t h", "th e", "\u2581 the", "a t", "\u2581 c"])  # fmt: skip
    return dict(version="1.0", truncation=None, padding=None, added_tokens=special, normalizer={"type": "Sequence", "normalizers": pieces},
                pre_tokenizer=None, post_processor=None, decoder={"type": "Sequence", "decoders": back}, model=model)  # fmt: skip
