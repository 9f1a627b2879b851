"""The files beside the weights of an exported model: tokenizer, generation, image processor."""

import contextlib
import json
import shutil
import sys
from typing import Any

from etils import epath

from uoe_jax.config.schema import ModelConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer
from uoe_jax.data.tokenizers.ends import SEPARATORS, template
from uoe_jax.data.tokenizers.hf import BYTE_OF, HFTokenizer
from uoe_jax.errors import RunError, UserError
from uoe_jax.exchange.config_keys import GENERATION_FILE, PROCESSOR_FILE, image_bound
from uoe_jax.exchange.layouts import Values
from uoe_jax.workdir import read_json

# Of the imported model. The run's tokenizer is the imported one.
_BESIDE = (
    *(GENERATION_FILE, PROCESSOR_FILE, "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model"),
)
_CLASS, _CLASS_5 = "PreTrainedTokenizerFast", "TokenizersBackend"  # in transformers 4 and 5


def add_end(values: Values, tokenizer: Tokenizer | None) -> Values:
    """A config.json or generation_config.json in which the separator ends a text.

    A list of ends that has it stays as it is.
    """
    if tokenizer is None:
        return values
    found = values.get("eos_token_id")
    known = tokenizer.separator in (found if isinstance(found, list) else [found])
    end = found if known else tokenizer.separator
    return {"bos_token_id": tokenizer.start, **values, "eos_token_id": end}


def write_image_processor(m: ModelConfig, out: epath.Path) -> None:
    """preprocessor_config.json that scales pixels as training, unless the imported one does."""
    image, n = m.image, m.image.channels
    if (out / PROCESSOR_FILE).exists():
        with contextlib.suppress(UserError):
            if image_bound(out, {"height": image.height, "channels": n}, False) == image.bound:
                return
        scaled = f"scales pixels from -{image.bound:g} to {image.bound:g} now, as here"
        print(f"uoe: {PROCESSOR_FILE} {scaled}", file=sys.stderr)
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    scale = {"image_mean": [0.5] * n, "image_std": [0.5 / image.bound] * n}
    size = {"height": image.height, "width": image.width}
    first = {"image_processor_type": "ViTImageProcessor", "size": size, "rescale_factor": 1 / 255}
    write_checked(out / PROCESSOR_FILE, {**first, **steps, **scale})


def write_tokenizer(
    tokenizer: Tokenizer | None, source: epath.Path, out: epath.Path, vocab_size: int
) -> None:
    """The files of the imported model, or those made of the run's tokenizer.

    The tokenizer puts the start token in front. vocab_size: of the model, which may be larger than
    the tokenizer's; the tokens between are suppressed, as in `uoe generate`.
    """
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if tokenizer is None:
        return
    generation = read_json(out / GENERATION_FILE, "remove it") or {}
    if unused := range(tokenizer.vocab_size, vocab_size):
        suppressed = {*(generation.get("suppress_tokens") or ()), *unused}
        generation["suppress_tokens"] = sorted(suppressed)
    write_checked(out / GENERATION_FILE, add_end(generation, tokenizer))
    content = tokenizer_file(tokenizer)
    if content is None:
        why = "a vocabulary of words has no form that transformers reads"
        print(f"uoe: {why}; the tokenizer was left out", file=sys.stderr)
        return
    named = {token["id"]: token["content"] for token in content["added_tokens"]}
    start, end = named[tokenizer.start], named[tokenizer.separator]
    settings = read_json(out / "tokenizer_config.json", "remove it") or {}
    adds_start = template(content.get("post_processor")) == ([start], [])
    adds_start = adds_start and settings.get("add_bos_token") is not False
    if source.is_dir() and adds_start and not settings.get("add_eos_token"):
        if settings.get("tokenizer_class") == _CLASS_5:  # transformers 4 does not know it
            write_checked(out / "tokenizer_config.json", settings | {"tokenizer_class": _CLASS})
        return
    if source.is_dir():
        what = f"tokenizer.json puts {start!r} alone in front of a text now"
        print(f"uoe: {what}, as training and uoe generate do", file=sys.stderr)
    write_checked(out / "tokenizer.json", _with_start(content, start, tokenizer.start))
    for name in ("add_bos_token", "add_eos_token"):
        settings.pop(name, None)
    plain = {"clean_up_tokenization_spaces": False, "eos_token": end}
    own = {"tokenizer_class": _CLASS, "bos_token": start}
    own["model_input_names"] = ["input_ids", "attention_mask"]
    write_checked(out / "tokenizer_config.json", plain | settings | own)


def _with_start(content: Values, start: str, i: int) -> Values:
    """A tokenizer.json that puts a token in front of every text."""
    piece = {"SpecialToken": {"id": start, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    step = {
        "type": "TemplateProcessing",
        "single": [piece, first],
        "pair": [piece, first, second],
        "special_tokens": {start: {"id": start, "ids": [i], "tokens": [start]}},
    }
    return content | {"post_processor": step}


def tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer.json of the tokenizers library with the same tokens; None for words."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.content
    if not isinstance(tokenizer, ByteTokenizer):
        return None
    end, name = tokenizer.separator, SEPARATORS[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_byte = {"type": "ByteLevel", "add_prefix_space": False}
    by_byte |= {"trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [dict(id=end, content=name, special=True, **flags)],
        "pre_tokenizer": by_byte,
        "decoder": by_byte,
        "model": {"type": "BPE", "vocab": {**BYTE_OF, name: end}, "merges": []},
    }


def write_checked(path: epath.Path, value: Values) -> None:
    """Writes JSON, sorted as `save_pretrained` does, and reads it back."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(value)):
        raise RunError(f"{path}: is not what was written; write it again, on another disk perhaps")
