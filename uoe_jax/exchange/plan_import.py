"""What `uoe import` makes of a directory: the configuration and the tokenizer. Imports no jax."""

import copy
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
from uoe_jax.exchange.config_keys import AGAIN, generation_notes, image_bound
from uoe_jax.exchange.families import FAMILIES, MISTRAL_WINDOW, Family, differences
from uoe_jax.exchange.layouts import Values
from uoe_jax.workdir import CONFIG, checkpoint_path, locate, read_json

TOKENIZER = "tokenizer.json"
LONGEST = 2048  # tokens of a row by default; few training steps hold the rows that models take
ROUTING = {"gate": "straight_through", "balance_weight": 0.0, "capacity_factor": 1.25}
TUNING = {"learning_rate": 1e-4, "warmup_steps": 100}


class ImportPlan(NamedTuple):
    """An import before any weight is read."""

    source: epath.Path  # the directory
    family: Family
    theirs: Values  # its config.json
    config: Config
    tokenizer: HFTokenizer | None
    notes: tuple[str, ...] = ()  # what its files say and this import does not follow; sentences


def plan(
    source: str, base: str | None, routing: Values, overrides: Mapping[str, str], workdir: str
) -> ImportPlan:
    """Reads config.json and tokenizer of a directory in Hugging Face's layout, or UserError.

    base: a config file, of which all but `model` and the routing are taken; None: the defaults for
    fine-tuning. routing: keys of both blocks as text, or None; `overrides` win.
    """
    target = checkpoint_path(workdir)
    try:
        place = locate(source, "--from").resolve()
        theirs = read_json(place / CONFIG, AGAIN)
        if theirs is None:
            raise UserError(f"has no {CONFIG}; give the directory that save_pretrained wrote")
        kind = theirs.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            remedy = f"models of the types {', '.join(FAMILIES)} can be imported"
            raise UserError(f"{CONFIG} has model_type={kind!r}; {remedy}")
        family, model = FAMILIES[kind], FAMILIES[kind].read(theirs)
        notes = generation_notes(place, theirs)
        if model["stem"] == "image":
            overridden = "model.image.bound" in overrides
            model["image"]["bound"] = image_bound(place, model["image"], overridden)
        values = evaluate(base) if base else config_lib.to_dict(Config())
        data, ends = values.get("data", {}), ("separator", "start")
        named = {key: overrides.get(f"data.{key}", data.get(key, "")) for key in ends}
        tokenizer = read_tokenizer(place, named)
        size = model["vocab_size"]
        if tokenizer is not None and tokenizer.vocab_size > size:
            both = f"{tokenizer.vocab_size} tokens and {CONFIG} vocab_size={size}"
            raise UserError(f"{TOKENIZER} has {both}; they are not of one model")
    except UserError as error:
        if str(error).startswith("--from"):
            raise
        raise UserError(f"--from={source}: {error}") from error
    if tokenizer is not None:
        notes += tokenizer.ends.notes
        file = str(target / TOKENIZER)
        values["data"] |= {"tokenizer": tokenizer.kind, "tokenizer_file": file}
    longest = model["context_length"]
    _set_model(values, model, bool(base))
    routing = {key: text for key, text in routing.items() if text is not None}
    given = {f"model.{name}.{key}": routing[key] for name in ("smha", "uome") for key in routing}
    for key, text in {**given, **overrides}.items():
        put(values, key, config_lib.parse_value(key, text))
    config = config_lib.from_dict(values)
    _check(config, model, longest, theirs)
    return ImportPlan(place, family, theirs, config, tokenizer, tuple(notes))


def _set_model(values: Values, model: Values, has_base: bool) -> None:
    """The imported `model` in the configuration, with blocks cut into experts."""
    if not has_base:
        values["optimizer"] |= TUNING
        for name in ("smha", "uome"):
            values["model"][name] |= ROUTING | ({} if model["causal"] else {"priority": "score"})
    if model["task"] == "language" and model["position"] == "rope":
        model["context_length"] = min(model["context_length"], LONGEST)
    blocks = {"attention": "smha", "mlp": "uome", "moe": {}, "dropout": 0.0, "cutoff_div": 1}
    values["model"] |= copy.deepcopy({**blocks, **model})


def _check(config: Config, model: Values, longest: int, theirs: Values) -> None:
    """UserError where the configuration differs from the weights in more than routing and context,
    or the context is longer than the model takes."""
    for key, own, value in differences(config_lib.to_dict(config.model), model):
        if key not in ("context_length", "image.bound"):
            why = f"the weights are of a model with {value!r}"
            raise UserError(f"--config.model.{key}={own!r}: {why}; leave it out")
    m, why = config.model, ""
    if theirs["model_type"] == "mistral":
        if theirs.get("sliding_window", MISTRAL_WINDOW) is not None:
            why = "tokens in the window of its attention"
    elif m.position == "learned":
        why = "learned positions"
    if m.context_length > longest and why and m.task == "language":
        option = f"--config.model.context_length={m.context_length}"
        raise UserError(f"{option}: the model has {longest} {why}; give at most that")


def read_tokenizer(place: epath.Path, named: Values) -> HFTokenizer | None:
    """The tokenizer of a directory; None where it has none. UserError if it cannot be used.
    named: data.separator and data.start, the ends of documents; "" where they are not given."""
    content = read_json(place / TOKENIZER, AGAIN)
    if content is None:
        for name in ("tokenizer.model", "vocab.json", "spiece.model"):
            if (place / name).exists():
                how = "transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
                remedy = f"write a tokenizer.json beside it with {how}"
                raise UserError(f"{name} is of a format that is not read here; {remedy}")
        return None
    model, other = content.get("model"), read_json(place / "vocab.json", AGAIN) or {}
    own = model.get("vocab") if isinstance(model, dict) else None
    for token, i in own.items() if isinstance(own, dict) else ():
        if other.get(token, i) != i:  # older programs read that file
            ids = f"the id {i} and vocab.json {other[token]}"
            raise UserError(f"{TOKENIZER} gives {token!r} {ids}; remove one of the two")
    files = files_beside(place)
    _check_prefix_space(files.get("tokenizer_config.json", {}), content)
    ends = functools.partial(find_ends, files=files, **named)
    for kind in ("bpe", "library"):  # SentencePiece's and those with a normalizer are not exact
        try:
            return HFTokenizer(content, kind, ends)
        except UserError as error:
            failed = error
    remedy = "" if ";" in str(failed) else f"; {AGAIN}"
    raise UserError(f"{TOKENIZER} {failed}{remedy}") from failed


def _check_prefix_space(settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """UserError where tokenizer_config.json, from which some versions of transformers rebuild the
    tokenizer, and tokenizer.json differ on a leading space."""
    asked, found = settings.get("add_prefix_space"), None
    for step in (*steps_of(content.get("pre_tokenizer")), *steps_of(content.get("normalizer"))):
        if step.get("type") == "ByteLevel":
            found = bool(step.get("add_prefix_space"))
        elif step.get("type") in ("Metaspace", "Prepend"):
            never = step.get("prepend_scheme") == "never"
            found = not never and step.get("add_prefix_space") is not False
    if isinstance(asked, bool) and found is not None and asked != found:
        both = f"add_prefix_space={asked} and {TOKENIZER} {found}"
        raise UserError(f"tokenizer_config.json has {both}; make them one")
