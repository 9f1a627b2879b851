"""`uoe export`: weights as safetensors, or as a dense or routed model for `transformers`."""

import functools
import json
import sys
from importlib import resources
from typing import Iterable, Iterator, NamedTuple

import jax
import numpy as np
from etils import epath

from uoe_jax.config.baselines import SECTIONS, UNIONS
from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.exchange.export_files import (
    add_end,
    write_checked,
    write_image_processor,
    write_tokenizer,
)
from uoe_jax.exchange.families import FAMILIES, LLAMA, family_for
from uoe_jax.exchange.importing import dense_shapes
from uoe_jax.exchange.layouts import ALIASES, Entry, Values
from uoe_jax.exchange.tensors import Tensor, dotted, write
from uoe_jax.moe import decompose
from uoe_jax.train.step import Params
from uoe_jax.workdir import CONFIG, read_json

MODELING = "modeling_uoe.py"  # in the package below `hf-code`, which cannot be imported


class Target(NamedTuple):
    """Where an export goes, and how."""

    out: epath.Path  # an empty directory
    dtype: str  # of the weights
    lossy: bool  # whether numbers may overflow or underflow in it
    source: epath.Path  # in the workdir, with the files of the imported model if there was one

    def write(self, tensors: Iterable[Tensor]) -> None:
        n_lost = write(self.out, tensors, self.dtype, lossy=self.lossy)
        if n_lost:
            print(f"uoe: {n_lost:,} numbers became infinity or 0 in {self.dtype}", file=sys.stderr)


def export_safetensors(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """Weights under their dotted names, the configuration, the tokenizer in our own format."""
    target.write(_leaves(params))
    write_checked(target.out / CONFIG, to_dict(config))
    if tokenizer is not None:
        write_checked(target.out / "tokenizer.json", json.loads(tokenizer.to_json()))


def export_dense(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """The dense model of all experts, in its family's layout, for `AutoModel…from_pretrained`.

    Raises:
      UserError, ConfigError: no family has such blocks.
    """
    m = config.model
    for key in ("attention", "mlp"):
        if getattr(m, key) not in ("dense", *UNIONS):
            why = "is no dense block cut in experts, so no model of Hugging Face's own loads it"
            remedy = f"{why}; use --format=safetensors"
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)
    family, theirs = family_for(m)
    flat = {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

    def make(entry: Entry, i: int | None) -> np.ndarray:
        leaves = [flat[path] if i is None else flat[path][i : i + 1] for path in entry.ours]
        wholes = [np.asarray(decompose.join_leaf(*x, m)) for x in zip(entry.ours, leaves)]
        return entry.into_theirs(wholes if i is None else [a[0] for a in wholes])

    def tensors() -> Iterator[Tensor]:
        shapes = dense_shapes(m)
        for entry in family.entries(m):
            for i in entry.layers(m):
                make_it = functools.partial(make, entry, i)
                yield Tensor(entry.theirs.format(i=i), entry.shape(shapes), make_it)

    target.write(tensors())
    # `torch_dtype` for readers of transformers 4, `dtype` of 5.
    dtypes = {"dtype": target.dtype, "torch_dtype": target.dtype}
    values = _as_imported(theirs, target.source, m) | dtypes
    write_checked(target.out / CONFIG, add_end(values, tokenizer))
    write_tokenizer(tokenizer, target.source, target.out, m.vocab_size)
    if m.stem == "image":
        write_image_processor(m, target.out)


def export_routed(
    config: Config, params: Params, tokenizer: Tokenizer | None, target: Target
) -> None:
    """The routed model for PyTorch: `modeling_uoe.py` beside the weights (`trust_remote_code`).

    Raises:
      ConfigError: it is no causal language model of dense blocks and unions.
    """
    m = config.model
    known: Values = dict(task=("language",), causal=(True,), cutoffs=("",))
    known |= dict(attention=("dense", "smha"), mlp=("dense", "uome"))
    for key, values in known.items():
        if getattr(m, key) not in values:
            remedy = "has no code in PyTorch here; use --format=safetensors, or --format=stablehlo"
            raise ConfigError(f"config.model.{key}", getattr(m, key), remedy)
    target.write(_leaves(params))
    code = resources.files("uoe_jax.exchange") / "hf-code" / MODELING
    (target.out / MODELING).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
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
        "dtype": target.dtype,
        "torch_dtype": target.dtype,
    }
    write_checked(target.out / CONFIG, add_end(theirs, tokenizer))
    write_tokenizer(tokenizer, target.source, target.out, m.vocab_size)


def _leaves(params: Params) -> Iterator[Tensor]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield Tensor(dotted(path), leaf.shape, functools.partial(jax.device_get, leaf))


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
