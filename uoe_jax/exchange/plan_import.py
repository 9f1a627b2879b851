"""What `uoe import` is to make of a directory: the configuration and the tokenizer. Imports no jax."""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple

from etils import epath

from uoe_jax import config as config_lib
from uoe_jax.config import Config
from uoe_jax.config_file import evaluate, put
from uoe_jax.data.library import LibraryTokenizer
from uoe_jax.data.tokenizer import BPETokenizer, Tokenizer
from uoe_jax.errors import UserError
from uoe_jax.exchange.families import Family, family_of
from uoe_jax.workdir import locate, read_json

TOKENIZER, CONFIG = "tokenizer.json", "config.json"
LONGEST = 2048  # tokens of a row, where nobody says more: many models take rows that no training step here holds
ROUTING = {"gate": "straight_through", "balance_weight": 0.0, "capacity_factor": 1.25}
TUNING = {"learning_rate": 1e-4, "warmup_steps": 100}


class Plan(NamedTuple):
    """An import before any weight is read.

    Attributes:
      source: the directory. theirs: its config.json. tokenizer: of text; None where the directory has none.
    """

    source: epath.Path
    family: Family
    theirs: dict[str, Any]
    config: Config
    tokenizer: Tokenizer | None


def plan(
    source: str, base: str | None, experts: str, k: str, capacity: str | None, overrides: Mapping[str, str], workdir: str
) -> Plan:
    """Reads config.json and tokenizer of a directory in Hugging Face's layout.

    Args:
      base: a config file whose sections but `model`, and whose routing, are taken; None: the defaults for fine-tuning.
      experts, k, capacity: N, K and capacity_factor of both blocks; what `overrides` say of one of them goes before.

    Raises:
      UserError: no such directory, another family, a tokenizer that is not the model's, numbers that do not fit.
    """
    try:
        place = locate(source, "--from").resolve()
        theirs = read_json(place / CONFIG, "download the model again")
        if theirs is None:
            raise UserError(f"has no {CONFIG}; give the directory of a model that save_pretrained wrote")
        family = family_of(theirs)
        model = family.model(theirs)
        tokenizer = read_tokenizer(place)
        if tokenizer is not None and tokenizer.vocab_size > model["vocab_size"]:
            raise UserError(f"{TOKENIZER} has {tokenizer.vocab_size} tokens and {CONFIG} vocab_size={model['vocab_size']}; they are not of one model")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("--from") else f"--from={source}: {text}") from error
    values = evaluate(base) if base else config_lib.to_dict(Config())
    if not base:
        values["optimizer"] |= TUNING
        for name in ("smha", "uome"):
            values["model"][name] |= ROUTING | ({} if model["causal"] else {"priority": "score"})
    longest = model["context_length"]
    if model["task"] == "language" and model["position"] == "rope":
        model["context_length"] = min(longest, LONGEST)
    values["model"] |= {"attention": "smha", "mlp": "uome", "moe": {}, "dropout": 0.0, "cutoff_div": 1, **model}
    if model["stem"] == "image":
        values["model"]["image"]["bound"] = bound_of(place, source, overrides)
    if tokenizer is not None:
        file = str(locate(workdir).resolve() / TOKENIZER)
        values["data"] |= {"tokenizer": "bpe" if isinstance(tokenizer, BPETokenizer) else "library", "tokenizer_file": file}
    for name in ("smha", "uome"):
        put(values, f"model.{name}.n_experts", config_lib.parse_value(f"model.{name}.n_experts", experts))
        put(values, f"model.{name}.k", config_lib.parse_value(f"model.{name}.k", k))
        if capacity is not None:
            put(values, f"model.{name}.capacity_factor", config_lib.parse_value(f"model.{name}.capacity_factor", capacity))
    for key, text in overrides.items():
        put(values, key, config_lib.parse_value(key, text))
    return Plan(place, family, theirs, _checked(config_lib.from_dict(values), model, longest, theirs), tokenizer)


def _checked(config: Config, model: Mapping[str, Any], longest: int, theirs: Mapping[str, Any]) -> Config:
    """The configuration, where nothing of the model but routing and context differs from what the weights are."""
    own = config_lib.to_dict(config.model)
    for key, value in model.items():
        given = own[key] if not isinstance(value, Mapping) else {name: own[key][name] for name in value}
        if given != value and key != "context_length":
            raise UserError(f"--config.model.{key}={given!r}: the weights are of a model with {value!r}; leave it out")
    m = config.model
    why = "learned positions" if m.position == "learned" else "tokens in the window of its attention" if theirs.get("sliding_window") else ""
    if m.context_length > longest and why and m.task == "language":
        raise UserError(f"--config.model.context_length={m.context_length}: the model has {longest} {why}; give at most that")
    return config


def bound_of(place: epath.Path, source: str, overrides: Mapping[str, str]) -> float:
    """`model.image.bound` of the directory's preprocessor_config.json: pixels from 0 to 1, less 0.5, over one standard deviation.

    Raises:
      UserError: its channels are not alike, and nobody says that this does not matter.
    """
    given = read_json(place / "preprocessor_config.json", "download the model again") or {}
    mean, deviation = given.get("image_mean") or [0.5], given.get("image_std") or [0.5]
    if {*mean} == {0.5} and len({*deviation}) == 1:
        return 0.5 / deviation[0]
    if "model.image.bound" in overrides:
        return 1.0
    remedy = "pixels are scaled alike in all channels here; give --config.model.image.bound=2 to take the weights all the same"
    raise UserError(f"--from={source}: preprocessor_config.json has image_mean={mean} and image_std={deviation}, and {remedy}")


def read_tokenizer(place: epath.Path) -> Tokenizer | None:
    """The tokenizer of a directory; None where it has none.

    Raises:
      UserError: it cannot be used.
    """
    content = read_json(place / TOKENIZER, "download the model again")
    if content is None:
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (place / name).exists()]
        if others:
            remedy = "write a tokenizer.json beside it with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            raise UserError(f"{others[0]} is of a format that is not read here; {remedy}")
        return None
    try:
        return BPETokenizer(content)
    except UserError:  # not exact, as SentencePiece's kind and those with a normalizer are not
        try:
            return LibraryTokenizer(content)
        except UserError as error:
            raise UserError(f"{TOKENIZER} {error}; download the model again") from error

