"""What `uoe import` is to make of a directory: the configuration and the tokenizer. Imports no jax."""

from __future__ import annotations

import functools
from typing import Any, Mapping, NamedTuple

from etils import epath

from uoe_jax import config as config_lib
from uoe_jax.config.load import evaluate, put
from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.ends import find_ends
from uoe_jax.data.tokenizers.hf import HFTokenizer, steps_of
from uoe_jax.data.tokenizers.load import files_beside
from uoe_jax.errors import UserError
from uoe_jax.exchange.config_keys import generation_notes, image_bound
from uoe_jax.exchange.families import MISTRAL_WINDOW, Family, family_of, model_of
from uoe_jax.workdir import checkpoint_path, locate, read_json

TOKENIZER, CONFIG = "tokenizer.json", "config.json"
LONGEST = 2048  # tokens of a row, where nobody says more: many models take rows that no training step here holds
ROUTING = {"gate": "straight_through", "balance_weight": 0.0, "capacity_factor": 1.25}
TUNING = {"learning_rate": 1e-4, "warmup_steps": 100}


class Plan(NamedTuple):
    """An import before any weight is read.

    Attributes:
      source: the directory. theirs: its config.json. tokenizer: of text; None where the directory has none.
      notes: what its files say and this import does not follow, a sentence each.
    """

    source: epath.Path
    family: Family
    theirs: dict[str, Any]
    config: Config
    tokenizer: HFTokenizer | None
    notes: tuple[str, ...] = ()


def plan(
    source: str,
    base: str | None,
    experts: str,
    k: str,
    capacity: str | None,
    overrides: Mapping[str, str],
    workdir: str,
) -> Plan:
    """Reads config.json and tokenizer of a directory in Hugging Face's layout.

    Args:
      base: a config file whose sections but `model`, and whose routing, are taken; None: the defaults for fine-tuning.
      experts, k, capacity: N, K and capacity_factor of both blocks; what `overrides` say of one of them goes before.

    Raises:
      UserError: no such directory, another family, a tokenizer that is not the model's, numbers that do not fit.
    """
    target = checkpoint_path(workdir)
    try:
        place = locate(source, "--from").resolve()
        theirs = read_json(place / CONFIG, "download the model again")
        if theirs is None:
            raise UserError(
                f"has no {CONFIG}; give the directory of a model that save_pretrained wrote"
            )
        family = family_of(theirs)
        model = model_of(family, theirs)
        notes = generation_notes(place, theirs)
        bound = image_bound(place, model, overrides) if model["stem"] == "image" else None
        values = evaluate(base) if base else config_lib.to_dict(Config())
        tokenizer = read_tokenizer(place, values.get("data", {}), overrides)
        if tokenizer is not None and tokenizer.vocab_size > model["vocab_size"]:
            raise UserError(
                f"{TOKENIZER} has {tokenizer.vocab_size} tokens and {CONFIG} vocab_size={model['vocab_size']}; they are not of one model"
            )
    except UserError as error:
        text = str(error)
        raise UserError(
            text if text.startswith("--from") else f"--from={source}: {text}"
        ) from error
    if not base:
        values["optimizer"] |= TUNING
        for name in ("smha", "uome"):
            values["model"][name] |= ROUTING | ({} if model["causal"] else {"priority": "score"})
    longest = model["context_length"]
    if model["task"] == "language" and model["position"] == "rope":
        model["context_length"] = min(longest, LONGEST)
    values["model"] |= {
        "attention": "smha",
        "mlp": "uome",
        "moe": {},
        "dropout": 0.0,
        "cutoff_div": 1,
        **model,
    }
    if bound is not None:
        values["model"]["image"]["bound"] = bound
    if tokenizer is not None:
        notes += tokenizer.ends.notes
        file = str(target / TOKENIZER)
        values["data"] |= {"tokenizer": tokenizer.kind, "tokenizer_file": file}
    for name in ("smha", "uome"):
        put(
            values,
            f"model.{name}.n_experts",
            config_lib.parse_value(f"model.{name}.n_experts", experts),
        )
        put(values, f"model.{name}.k", config_lib.parse_value(f"model.{name}.k", k))
        if capacity is not None:
            put(
                values,
                f"model.{name}.capacity_factor",
                config_lib.parse_value(f"model.{name}.capacity_factor", capacity),
            )
    for key, text in overrides.items():
        put(values, key, config_lib.parse_value(key, text))
    config = _checked(config_lib.from_dict(values), model, longest, theirs)
    return Plan(place, family, theirs, config, tokenizer, tuple(notes))


def _checked(
    config: Config, model: Mapping[str, Any], longest: int, theirs: Mapping[str, Any]
) -> Config:
    """The configuration, where nothing of the model but routing and context differs from what the weights are."""
    own = config_lib.to_dict(config.model)
    for key, value in model.items():
        given = (
            own[key] if not isinstance(value, Mapping) else {name: own[key][name] for name in value}
        )
        if given != value and key != "context_length":
            raise UserError(
                f"--config.model.{key}={given!r}: the weights are of a model with {value!r}; leave it out"
            )
    m = config.model
    has_window = (
        theirs["model_type"] == "mistral"
        and theirs.get("sliding_window", MISTRAL_WINDOW) is not None
    )
    why = (
        "learned positions"
        if m.position == "learned"
        else "tokens in the window of its attention"
        if has_window
        else ""
    )
    if m.context_length > longest and why and m.task == "language":
        raise UserError(
            f"--config.model.context_length={m.context_length}: the model has {longest} {why}; give at most that"
        )
    return config


def read_tokenizer(
    place: epath.Path, data: Mapping[str, Any], overrides: Mapping[str, str]
) -> HFTokenizer | None:
    """The tokenizer of a directory; None where it has none.

    data, overrides: may name the ends of documents (data.separator, data.start).

    Raises:
      UserError: it cannot be used.
    """
    content = read_json(place / TOKENIZER, "download the model again")
    if content is None:
        others = [
            name
            for name in ("tokenizer.model", "vocab.json", "spiece.model")
            if (place / name).exists()
        ]
        if others:
            remedy = "write a tokenizer.json beside it with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
            raise UserError(f"{others[0]} is of a format that is not read here; {remedy}")
        return None
    _check_vocabularies(place, content)
    files = files_beside(place)
    _check_prefix_space(files.get("tokenizer_config.json", {}), content)
    named = {key: overrides.get(f"data.{key}", data.get(key, "")) for key in ("separator", "start")}
    ends = functools.partial(find_ends, files=files, **named)
    try:
        return HFTokenizer(content, "bpe", ends)
    except UserError:  # not exact, as SentencePiece's kind and those with a normalizer are not
        try:
            return HFTokenizer(content, "library", ends)
        except UserError as error:
            remedy = "" if ";" in str(error) else "; download the model again"
            raise UserError(f"{TOKENIZER} {error}{remedy}") from error


def _check_prefix_space(settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """UserError where tokenizer_config.json, by which some versions of transformers rebuild it, says otherwise of the space
    in front of a text than tokenizer.json."""
    said, found = settings.get("add_prefix_space"), None
    for step in (*steps_of(content.get("pre_tokenizer")), *steps_of(content.get("normalizer"))):
        if step.get("type") == "ByteLevel":
            found = bool(step.get("add_prefix_space"))
        elif step.get("type") in ("Metaspace", "Prepend"):
            found = (
                step.get("prepend_scheme") != "never" and step.get("add_prefix_space") is not False
            )
    if isinstance(said, bool) and found is not None and said != found:
        raise UserError(
            f"tokenizer_config.json has add_prefix_space={said} and {TOKENIZER} {found}; make them one"
        )


def _check_vocabularies(place: epath.Path, content: Mapping[str, Any]) -> None:
    """UserError where vocab.json, which older programs read, gives a token another id than tokenizer.json."""
    model = content.get("model")
    own = model.get("vocab") if isinstance(model, dict) else None
    other = read_json(place / "vocab.json", "download the model again") or {}
    for token, i in own.items() if isinstance(own, dict) else ():
        if other.get(token, i) != i:
            raise UserError(
                f"{TOKENIZER} gives {token!r} the id {i} and vocab.json {other[token]}; remove one of the two"
            )
