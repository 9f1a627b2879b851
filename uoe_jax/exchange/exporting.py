"""`uoe export`: weights as safetensors, or as a dense or routed model for `transformers`."""

import contextlib
import functools
import json
import shutil
from importlib import resources
from typing import Any, Iterable, Iterator, NamedTuple

import jax
import numpy as np
from etils import epath

from uoe_jax.config.baselines import SECTIONS, UNIONS
from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import Config, ImageConfig, ModelConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer
from uoe_jax.data.tokenizers.ends import SEPARATORS, template
from uoe_jax.data.tokenizers.hf import BYTE_OF, HFTokenizer
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.exchange.config_keys import GENERATION_FILE, PROCESSOR_FILE, image_bound
from uoe_jax.exchange.families import FAMILIES, LLAMA, family_for
from uoe_jax.exchange.importing import dense_shapes
from uoe_jax.exchange.layouts import ALIASES, Entry, Values
from uoe_jax.exchange.tensors import Tensor, by_name, write
from uoe_jax.moe import decompose
from uoe_jax.runtime_env import notice
from uoe_jax.train.step import Params
from uoe_jax.workdir import CONFIG, read_json

# Of the imported model. The run's tokenizer is the imported one.
_BESIDE = """
    tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt
    added_tokens.json chat_template.jinja tokenizer.model
""".split()
_CLASS, _CLASS_5 = "PreTrainedTokenizerFast", "TokenizersBackend"  # in transformers 4 and 5
MODELING = "modeling_uoe.py"  # in the package below `hf-code`, which cannot be imported


class Export(NamedTuple):
    """What is exported, whereto and how."""

    config: Config
    params: Params
    tokenizer: Tokenizer | None
    out: epath.Path  # an empty directory
    dtype: str  # of the weights
    lossy: bool  # whether numbers may overflow or underflow in it
    source: epath.Path  # in the workdir, with the files of the imported model if there was one

    def write(self, tensors: Iterable[Tensor] | None = None) -> None:
        """The tensors; by default the weights under their dotted names."""
        if tensors is None:
            leaves, get = by_name(self.params).items(), jax.device_get
            tensors = (Tensor(name, a.shape, functools.partial(get, a)) for name, a in leaves)
        n_lost = write(self.out, tensors, self.dtype, lossy=self.lossy)
        if n_lost:
            notice(f"{n_lost:,} numbers became infinity or 0 in {self.dtype}")

    def describe(self, theirs: Values) -> None:
        """Writes config.json for `transformers`, and the tokenizer."""
        # `torch_dtype` for readers of transformers 4, `dtype` of 5.
        theirs = theirs | {"dtype": self.dtype, "torch_dtype": self.dtype}
        write_checked(self.out / CONFIG, _with_end(theirs, self.tokenizer))
        _write_tokenizer(self)


def export_safetensors(export: Export) -> None:
    """Weights under their dotted names, the configuration, the tokenizer in our own format."""
    export.write()
    write_checked(export.out / CONFIG, to_dict(export.config))
    if export.tokenizer is not None:
        write_checked(export.out / "tokenizer.json", json.loads(export.tokenizer.to_json()))


def export_dense(export: Export) -> None:
    """The dense model of all experts, in its family's layout, for `AutoModel…from_pretrained`;
    UserError where no family has such blocks."""
    m, flat = export.config.model, by_name(export.params)
    remedy = "is no dense block cut in experts, so no model of Hugging Face's own loads it"
    known = dict.fromkeys(("attention", "mlp"), ("dense", *UNIONS))
    _check_keys(m, known, f"{remedy}; use --format=safetensors")
    family, theirs = family_for(m)

    def make(entry: Entry, i: int | None) -> np.ndarray:
        leaves = [(path, flat[path] if i is None else flat[path][i]) for path in entry.ours]
        return entry.into_theirs([np.asarray(decompose.join_leaf(*leaf, m)) for leaf in leaves])

    def tensors() -> Iterator[Tensor]:
        shapes = dense_shapes(m)
        for entry in family.entries(m):
            for i in entry.layers(m):
                make_it = functools.partial(make, entry, i)
                yield Tensor(entry.theirs.format(i=i), entry.shape(shapes), make_it)

    export.write(tensors())
    export.describe(_as_imported(theirs, export.source, m))
    if m.stem == "image":
        _write_image_processor(m.image, export.out)


def export_routed(export: Export) -> None:
    """The routed model for PyTorch: `modeling_uoe.py` beside the weights (`trust_remote_code`);
    ConfigError unless it is a causal language model of dense blocks and unions."""
    m = export.config.model
    known: Values = dict(task=("language",), causal=(True,), cutoffs=("",))
    known |= dict(attention=("dense", "smha"), mlp=("dense", "uome"))
    remedy = "has no code in PyTorch here; use --format=safetensors, or --format=stablehlo"
    _check_keys(m, known, remedy)
    export.write()
    code = resources.files("uoe_jax.exchange") / "hf-code" / MODELING
    (export.out / MODELING).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
    classes = {"AutoConfig": "UoEConfig", "AutoModelForCausalLM": "UoEForCausalLM"}
    # modeling_uoe.py reads the sections of both unions, also beside a dense block.
    others = {*SECTIONS.values(), "classifier", "image"} - {*UNIONS}
    theirs: Values = {
        "model_type": "uoe",
        "architectures": ["UoEForCausalLM"],
        "auto_map": {auto: f"modeling_uoe.{name}" for auto, name in classes.items()},
        **{theirs: getattr(m, ours) for theirs, ours in LLAMA.sizes.items()},
        "num_key_value_heads": m.kv_heads,
        "max_position_embeddings": m.context_length,
        "tie_word_embeddings": m.tie_embeddings,
        "model": {key: value for key, value in to_dict(m).items() if key not in others},
    }
    export.describe(theirs)


def _check_keys(m: ModelConfig, known: Values, remedy: str) -> None:
    for key, values in known.items():
        if getattr(m, key) not in values:
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)


def _as_imported(theirs: Values, source: epath.Path, m: ModelConfig) -> Values:
    """Our config.json over the imported model's, which has more: class names, its own type."""
    before = read_json(source / CONFIG, "remove it")
    family = FAMILIES[theirs["model_type"]]
    if before is None or FAMILIES.get(str(before.get("model_type"))) is not family:
        return theirs
    kept = ("model_type", "architectures", "id2label", "label2id")
    ours = {key: value for key, value in theirs.items() if key not in kept}
    if m.position == "rope":  # rows were cut for training; the frequencies are what they were
        ours["max_position_embeddings"] = max(m.context_length, before["max_position_embeddings"])
    other_names = {name for key in theirs for name in ALIASES.get(key, ())}
    return {key: value for key, value in before.items() if key not in other_names} | ours


def _with_end(values: Values, tokenizer: Tokenizer | None) -> Values:
    """A config.json or generation_config.json in which the separator ends a text, alone or in a
    list of ends."""
    if tokenizer is None:
        return values
    found = values.get("eos_token_id")
    known = tokenizer.separator in (found if isinstance(found, list) else [found])
    end = found if known else tokenizer.separator
    return {"bos_token_id": tokenizer.start, **values, "eos_token_id": end}


def _write_image_processor(image: ImageConfig, out: epath.Path) -> None:
    """preprocessor_config.json that scales pixels as training, unless the imported one does."""
    n = image.channels
    if (out / PROCESSOR_FILE).exists():
        with contextlib.suppress(UserError):
            if image_bound(out, {"height": image.height, "channels": n}, False) == image.bound:
                return
        bound = f"{image.bound:g}"
        notice(f"{PROCESSOR_FILE} scales pixels from -{bound} to {bound} now, as here")
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    scale = {"image_mean": [0.5] * n, "image_std": [0.5 / image.bound] * n}
    size = {"height": image.height, "width": image.width}
    first = {"image_processor_type": "ViTImageProcessor", "size": size, "rescale_factor": 1 / 255}
    write_checked(out / PROCESSOR_FILE, {**first, **steps, **scale})


def _write_tokenizer(export: Export) -> None:
    """The files of the imported model, or those made of the run's tokenizer, which puts the start
    token in front. Tokens of the model that the tokenizer lacks are suppressed."""
    tokenizer, source, out = export.tokenizer, export.source, export.out
    for name in (GENERATION_FILE, PROCESSOR_FILE, *_BESIDE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if tokenizer is None:
        return
    generation = read_json(out / GENERATION_FILE, "remove it") or {}
    if unused := range(tokenizer.vocab_size, export.config.model.vocab_size):
        suppressed = {*(generation.get("suppress_tokens") or ()), *unused}
        generation["suppress_tokens"] = sorted(suppressed)
    write_checked(out / GENERATION_FILE, _with_end(generation, tokenizer))
    content = _tokenizer_file(tokenizer)
    if content is None:
        no_form = "a vocabulary of words has no form that transformers reads"
        return notice(f"{no_form}; the tokenizer was left out")
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
        now = f"tokenizer.json puts {start!r} alone in front of a text now"
        notice(f"{now}, as training and uoe generate do")
    piece = {"SpecialToken": {"id": start, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = {"id": start, "ids": [tokenizer.start], "tokens": [start]}
    step = {"type": "TemplateProcessing", "special_tokens": {start: ids}}
    step |= {"single": [piece, first], "pair": [piece, first, second]}
    write_checked(out / "tokenizer.json", content | {"post_processor": step})
    for name in ("add_bos_token", "add_eos_token"):
        settings.pop(name, None)
    plain = {"clean_up_tokenization_spaces": False, "eos_token": end}
    own = {"tokenizer_class": _CLASS, "bos_token": start}
    own["model_input_names"] = ["input_ids", "attention_mask"]
    write_checked(out / "tokenizer_config.json", plain | settings | own)


def _tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A tokenizer.json of the tokenizers library with the same tokens; None for words."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.content
    if not isinstance(tokenizer, ByteTokenizer):
        return None
    end, name = tokenizer.separator, SEPARATORS[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_byte = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
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
