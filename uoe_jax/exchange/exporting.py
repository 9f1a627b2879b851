"""`uoe export`: the weights of a run as safetensors, or as a model that `transformers` loads, dense or routed."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from importlib import resources
from typing import Any, Iterator

import jax
import numpy as np
from etils import epath

from uoe_jax import decompose
from uoe_jax.config import Config, ModelConfig, to_dict
from uoe_jax.config_peers import UNIONS
from uoe_jax.data.library import LibraryTokenizer
from uoe_jax.data.tokenizer import BYTE_OF, SEPARATORS, BPETokenizer, ByteTokenizer, Tokenizer
from uoe_jax.errors import ConfigError, RunError
from uoe_jax.exchange.families import FAMILIES, Values, family_for, into_theirs, their_shape
from uoe_jax.exchange.tensors import Tensor, dotted, write
from uoe_jax.train.step import Params
from uoe_jax.workdir import CONFIG, read_json

MODELING = "modeling_uoe.py"
# Of the model that was imported; its tokenizer's are of the run's tokenizer, which is the same.
_BESIDE = ("generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "tokenizer.model")  # fmt: skip


def export_safetensors(config: Config, params: Params, tokenizer: Tokenizer | None, out: epath.Path, dtype: str) -> None:
    """Weights under their dotted names, the run's configuration, and its tokenizer in our own format."""
    write(out, _leaves(params), dtype)
    _write_json(out / CONFIG, to_dict(config))
    if tokenizer is not None:
        _write_json(out / "tokenizer.json", json.loads(tokenizer.to_json()))


def export_dense(config: Config, params: Params, tokenizer: Tokenizer | None, source: epath.Path, out: epath.Path, dtype: str) -> None:
    """The dense model of all experts together, in the layout of its family: `AutoModel…from_pretrained` loads it.

    source: `source/` of the workdir, with the files of the model that was imported, if one was.

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
    dense = {path: _dense_shape(path, leaf.shape, m) for path, leaf in flat.items() if ".router." not in path}

    def tensors() -> Iterator[Tensor]:
        for entry in family.entries(m):
            layered = "{i}" in entry.theirs
            for layer in range(m.n_layers) if layered else (None,):

                def make(entry: Any = entry, layer: int | None = layer) -> np.ndarray:
                    wholes = [decompose.join_leaf(path, flat[path] if layer is None else flat[path][layer : layer + 1], m) for path in entry.ours]
                    return into_theirs(entry, [np.asarray(a) if layer is None else np.asarray(a)[0] for a in wholes])

                shapes = [dense[path][layered:] for path in entry.ours]
                yield Tensor(entry.theirs.format(i=layer), their_shape(entry, shapes), make)

    write(out, tensors(), dtype)
    _write_json(out / CONFIG, _ends(tokenizer) | _as_imported(theirs, source, m) | {"dtype": dtype})
    _write_beside(out, tokenizer, source)


def export_routed(config: Config, params: Params, tokenizer: Tokenizer | None, source: epath.Path, out: epath.Path, dtype: str) -> None:
    """The routed model for PyTorch: `modeling_uoe.py` beside the weights, loaded with `trust_remote_code=True`.

    Raises:
      ConfigError: it is no causal language model of dense blocks and unions.
    """
    m = config.model
    remedy = "has no code in PyTorch here; use --format=safetensors, or --format=stablehlo"
    for key, known in (("task", ("language",)), ("causal", (True,)), ("attention", ("dense", "smha")), ("mlp", ("dense", "uome")), ("cutoffs", ("",))):
        if getattr(m, key) not in known:
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)
    write(out, _leaves(params), dtype)
    names = {"AutoConfig": "modeling_uoe.UoEConfig", "AutoModelForCausalLM": "modeling_uoe.UoEForCausalLM"}
    theirs: Values = {
        "model_type": "uoe", "architectures": ["UoEForCausalLM"], "auto_map": names, "vocab_size": m.vocab_size, "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers, "num_attention_heads": m.n_heads, "num_key_value_heads": m.kv_heads,
        "intermediate_size": m.d_hidden, "max_position_embeddings": m.context_length, "tie_word_embeddings": m.tie_embeddings,
        "model": to_dict(m), "dtype": dtype,
    }  # fmt: skip
    _write_json(out / CONFIG, theirs | _ends(tokenizer))
    code = resources.files("uoe_jax.exchange").joinpath(MODELING).read_text()
    (out / MODELING).write_text(code)
    _write_beside(out, tokenizer, source)


def _leaves(params: Params) -> Iterator[Tensor]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield Tensor(dotted(path), leaf.shape, functools.partial(jax.device_get, leaf))


def _dense_shape(path: str, shape: tuple[int, ...], m: ModelConfig) -> tuple[int, ...]:
    return jax.eval_shape(lambda a: decompose.join_leaf(path, a, m), jax.ShapeDtypeStruct(shape, np.float32)).shape


def _as_imported(theirs: Values, source: epath.Path, m: ModelConfig) -> Values:
    """Our config.json over that of the model that was imported, which knows more than we need: names of classes, its own type."""
    before = read_json(source / CONFIG, "remove it")
    if before is None or FAMILIES.get(str(before.get("model_type"))) is not FAMILIES[theirs["model_type"]]:
        return theirs
    ours = {key: value for key, value in theirs.items() if key not in ("model_type", "architectures", "id2label", "label2id", "rope_parameters")}
    if m.position == "rope":  # a row was cut for training; the frequencies are what they were
        ours["max_position_embeddings"] = max(m.context_length, before["max_position_embeddings"])
    return {key: value for key, value in before.items() if key != "torch_dtype"} | ours


def _ends(tokenizer: Tokenizer | None) -> Values:
    return {} if tokenizer is None else {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.separator}


def _write_beside(out: epath.Path, tokenizer: Tokenizer | None, source: epath.Path) -> None:
    """The files of the imported model, or those made of the run's tokenizer."""
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if tokenizer is None or (out / "tokenizer.json").exists():
        return
    content = tokenizer_file(tokenizer)
    if content is None:
        print("uoe: a vocabulary of words has no form that transformers reads; the tokenizer was left out", file=sys.stderr)
        return
    named = {token["id"]: token["content"] for token in content["added_tokens"]}
    _write_json(out / "tokenizer.json", content)
    ends = {"bos_token": named[tokenizer.start], "eos_token": named[tokenizer.separator]}
    _write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends})


def tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer.json of the tokenizers library that makes the same tokens; None for words."""
    if isinstance(tokenizer, BPETokenizer):
        return json.loads(tokenizer.to_json())
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.file
    if not isinstance(tokenizer, ByteTokenizer):
        return None
    special = dict(id=tokenizer.separator, content=SEPARATORS[0], special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": {**BYTE_OF, SEPARATORS[0]: tokenizer.separator}, "merges": []}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **nothing, "added_tokens": [special], "pre_tokenizer": by_byte, "decoder": by_byte, "model": model}


def _write_json(path: epath.Path, value: Values) -> None:
    """Sorted, as `save_pretrained` writes it, and read back."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    if json.loads(path.read_text()) != json.loads(json.dumps(value)):
        raise RunError(f"{path}: is not what was written; write it again, on another disk perhaps")
