"""`uoe export`: the weights of a run as safetensors, or as a model that `transformers` loads, dense or routed."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from importlib import resources
from typing import Any, Iterable, Iterator, NamedTuple

import jax
import numpy as np
from etils import epath

from uoe_jax.config.baselines import UNIONS
from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer
from uoe_jax.data.tokenizers.ends import SEPARATORS, template
from uoe_jax.data.tokenizers.hf import BYTE_OF, HFTokenizer
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.exchange.config_keys import GENERATION_FILE, PROCESSOR_FILE, image_bound
from uoe_jax.exchange.families import (
    ALIASES,
    FAMILIES,
    Values,
    family_for,
    into_theirs,
    their_shape,
)
from uoe_jax.exchange.tensors import Tensor, dotted, write
from uoe_jax.moe import decompose
from uoe_jax.train.step import Params
from uoe_jax.workdir import CONFIG, read_json

MODELING = "modeling_uoe.py"
# Of the model that was imported; its tokenizer's are of the run's tokenizer, which is the same.
_BESIDE = ("generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "tokenizer.model")  # fmt: skip


class Target(NamedTuple):
    """Where an export goes, and how.

    Attributes:
      out: an empty directory. dtype: of the weights. lossy: whether numbers may overflow or underflow in it.
      source: `source/` of the workdir, with the files of the model that was imported, if one was.
    """

    out: epath.Path
    dtype: str
    lossy: bool
    source: epath.Path

    def write(self, tensors: Iterable[Tensor]) -> None:
        n_lost = write(self.out, tensors, self.dtype, lossy=self.lossy)
        if n_lost:
            print(f"uoe: {n_lost:,} numbers became infinity or 0 in {self.dtype}", file=sys.stderr)


def export_safetensors(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """Weights under their dotted names, the run's configuration, and its tokenizer in our own format."""
    target.write(_leaves(params))
    _write_json(target.out / CONFIG, to_dict(config))
    if tokenizer is not None:
        _write_json(target.out / "tokenizer.json", json.loads(tokenizer.to_json()))


def export_dense(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """The dense model of all experts together, in the layout of its family: `AutoModel…from_pretrained` loads it.

    Raises:
      UserError, ConfigError: no family has such blocks.
    """
    m = config.model
    for key in ("attention", "mlp"):
        if getattr(m, key) not in ("dense", *UNIONS):
            remedy = "is no dense block cut in experts, so no model of Hugging Face's own loads it; use --format=safetensors"
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)
    family, theirs = family_for(m)
    flat = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    dense = {
        path: _dense_shape(path, leaf.shape, m)
        for path, leaf in flat.items()
        if ".router." not in path
    }

    def tensors() -> Iterator[Tensor]:
        for entry in family.entries(m):
            layered = "{i}" in entry.theirs
            for layer in range(m.n_layers) if layered else (None,):

                def make(entry: Any = entry, layer: int | None = layer) -> np.ndarray:
                    wholes = [
                        decompose.join_leaf(
                            path, flat[path] if layer is None else flat[path][layer : layer + 1], m
                        )
                        for path in entry.ours
                    ]
                    return into_theirs(
                        entry,
                        [np.asarray(a) if layer is None else np.asarray(a)[0] for a in wholes],
                    )

                shapes = [dense[path][layered:] for path in entry.ours]
                yield Tensor(entry.theirs.format(i=layer), their_shape(entry, shapes), make)

    target.write(tensors())
    dtypes = {
        "dtype": target.dtype,
        "torch_dtype": target.dtype,
    }  # for readers of transformers 5 and of 4
    found = _as_imported(theirs, target.source, m) | dtypes
    _write_json(target.out / CONFIG, found if tokenizer is None else _with_ends(found, tokenizer))
    _write_beside(tokenizer, target, m.vocab_size)
    if m.stem == "image":
        _write_processor(m, target.out)


def export_routed(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """The routed model for PyTorch: `modeling_uoe.py` beside the weights, loaded with `trust_remote_code=True`.

    Raises:
      ConfigError: it is no causal language model of dense blocks and unions.
    """
    m = config.model
    remedy = "has no code in PyTorch here; use --format=safetensors, or --format=stablehlo"
    for key, known in (
        ("task", ("language",)),
        ("causal", (True,)),
        ("attention", ("dense", "smha")),
        ("mlp", ("dense", "uome")),
        ("cutoffs", ("",)),
    ):
        if getattr(m, key) not in known:
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)
    target.write(_leaves(params))
    names = {
        "AutoConfig": "modeling_uoe.UoEConfig",
        "AutoModelForCausalLM": "modeling_uoe.UoEForCausalLM",
    }
    theirs: Values = {
        "model_type": "uoe", "architectures": ["UoEForCausalLM"], "auto_map": names, "vocab_size": m.vocab_size, "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads, "num_key_value_heads": m.kv_heads,
        "intermediate_size": m.d_hidden, "max_position_embeddings": m.context_length, "tie_word_embeddings": m.tie_embeddings,
        "model": to_dict(m), "dtype": target.dtype, "torch_dtype": target.dtype,
    }  # fmt: skip
    _write_json(target.out / CONFIG, theirs if tokenizer is None else _with_ends(theirs, tokenizer))
    code = resources.files("uoe_jax.exchange").joinpath(MODELING).read_text(encoding="utf-8")
    (target.out / MODELING).write_text(code, encoding="utf-8")
    _write_beside(tokenizer, target, m.vocab_size)


def _leaves(params: Params) -> Iterator[Tensor]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield Tensor(dotted(path), leaf.shape, functools.partial(jax.device_get, leaf))


def _dense_shape(path: str, shape: tuple[int, ...], m: ModelConfig) -> tuple[int, ...]:
    return jax.eval_shape(
        lambda a: decompose.join_leaf(path, a, m), jax.ShapeDtypeStruct(shape, np.float32)
    ).shape


def _as_imported(theirs: Values, source: epath.Path, m: ModelConfig) -> Values:
    """Our config.json over that of the model that was imported, which knows more than we need: names of classes, its own type."""
    before = read_json(source / CONFIG, "remove it")
    if (
        before is None
        or FAMILIES.get(str(before.get("model_type"))) is not FAMILIES[theirs["model_type"]]
    ):
        return theirs
    ours = {
        key: value
        for key, value in theirs.items()
        if key not in ("model_type", "architectures", "id2label", "label2id")
    }
    if m.position == "rope":  # a row was cut for training; the frequencies are what they were
        ours["max_position_embeddings"] = max(m.context_length, before["max_position_embeddings"])
    other_names = {name for key in theirs for name in ALIASES.get(key, ())}
    return {key: value for key, value in before.items() if key not in other_names} | ours


def _with_ends(values: Values, tokenizer: Tokenizer) -> Values:
    """A config.json or generation_config.json in which the separator ends a text; a list that has it stays as it is."""
    found = values.get("eos_token_id")
    known = tokenizer.separator in (found if isinstance(found, list) else [found])
    return {
        "bos_token_id": tokenizer.start,
        **values,
        "eos_token_id": found if known else tokenizer.separator,
    }


def _write_processor(m: ModelConfig, out: epath.Path) -> None:
    """preprocessor_config.json that scales pixels as training here does, unless the imported one does so."""
    sizes = {"image": {"height": m.image.height, "channels": m.image.channels}}
    if (out / PROCESSOR_FILE).exists():
        with contextlib.suppress(UserError):
            if image_bound(out, sizes, {}) == m.image.bound:
                return
        print(
            f"uoe: {PROCESSOR_FILE} scales pixels from -{m.image.bound:g} to {m.image.bound:g} now, as here",
            file=sys.stderr,
        )
    n = m.image.channels
    _write_json(out / PROCESSOR_FILE, {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
        "size": {"height": m.image.height, "width": m.image.width}, "rescale_factor": 1 / 255,
        "image_mean": [0.5] * n, "image_std": [0.5 / m.image.bound] * n,
    })  # fmt: skip


def _write_beside(tokenizer: Tokenizer | None, target: Target, vocab_size: int) -> None:
    """The files of the imported model, or those made of the run's tokenizer; the tokenizer puts the start token in front.

    vocab_size: of the model, which may be more than the tokenizer's.
    """
    out = target.out
    for name in _BESIDE:
        if (target.source / name).is_file():
            shutil.copyfile(target.source / name, out / name)
    if tokenizer is None:
        return
    generation = read_json(out / GENERATION_FILE, "remove it") or {}
    if no_tokens := list(
        range(tokenizer.vocab_size, vocab_size)
    ):  # `uoe generate` does not draw them either
        generation["suppress_tokens"] = sorted(
            {*(generation.get("suppress_tokens") or ()), *no_tokens}
        )
    _write_json(out / GENERATION_FILE, _with_ends(generation, tokenizer))
    content = tokenizer_file(tokenizer)
    if content is None:
        print(
            "uoe: a vocabulary of words has no form that transformers reads; the tokenizer was left out",
            file=sys.stderr,
        )
        return
    named = {token["id"]: token["content"] for token in content["added_tokens"]}
    start, end = named[tokenizer.start], named[tokenizer.separator]
    settings = read_json(out / "tokenizer_config.json", "remove it") or {}
    by_itself = template(content.get("post_processor")) == ([start], [])
    if (
        target.source.is_dir()
        and by_itself
        and settings.get("add_bos_token") is not False
        and not settings.get("add_eos_token")
    ):
        if settings.get("tokenizer_class") == _CLASS_5:  # which transformers 4 does not know
            _write_json(out / "tokenizer_config.json", settings | {"tokenizer_class": _CLASS})
        return
    if target.source.is_dir():
        print(
            f"uoe: tokenizer.json puts {start!r} alone in front of a text now, as training and uoe generate do",
            file=sys.stderr,
        )
    _write_json(out / "tokenizer.json", _with_start(content, start, tokenizer.start))
    for name in ("add_bos_token", "add_eos_token"):
        settings.pop(name, None)
    own = {
        "tokenizer_class": _CLASS,
        "bos_token": start,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    plain = {"clean_up_tokenization_spaces": False, "eos_token": end}
    _write_json(out / "tokenizer_config.json", plain | settings | own)


_CLASS, _CLASS_5 = "PreTrainedTokenizerFast", "TokenizersBackend"


def _with_start(content: Values, start: str, i: int) -> Values:
    """A tokenizer.json that puts a token in front of every text."""
    piece, text = (
        {"SpecialToken": {"id": start, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    both = [piece, text, {"Sequence": {"id": "B", "type_id": 0}}]
    ids = {start: {"id": start, "ids": [i], "tokens": [start]}}
    step = {
        "type": "TemplateProcessing",
        "single": [piece, text],
        "pair": both,
        "special_tokens": ids,
    }
    return content | {"post_processor": step}


def tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer.json of the tokenizers library that makes the same tokens; None for words."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.content
    if not isinstance(tokenizer, ByteTokenizer):
        return None
    special = dict(
        id=tokenizer.separator,
        content=SEPARATORS[0],
        special=True,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
    )
    by_byte = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    model = {"type": "BPE", "vocab": {**BYTE_OF, SEPARATORS[0]: tokenizer.separator}, "merges": []}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {
        "version": "1.0",
        **nothing,
        "added_tokens": [special],
        "pre_tokenizer": by_byte,
        "decoder": by_byte,
        "model": model,
    }


def _write_json(path: epath.Path, value: Values) -> None:
    """Sorted, as `save_pretrained` writes it, and read back."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(value)):
        raise RunError(f"{path}: is not what was written; write it again, on another disk perhaps")
