"""Config files: Python programs that make a configuration, or the `config.json` of a run; no jax."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import os
import traceback
import typing
from pathlib import Path
from typing import Any, Mapping, Sequence

from etils import epath

from uoe_jax.config.fields import checked, leaves, parsed, printable
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_cutoffs, check_model, check_run, check_training
from uoe_jax.errors import ConfigError, UserError


def base() -> Any:
    """An `ml_collections.ConfigDict` with every key at its default; what a config file starts from."""
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


DECLARED = {name: (default, meta) for name, default, meta in leaves(Config())}  # every key
ALL_KEYS = tuple(DECLARED)


def unknown_key(name: str) -> UserError:
    """The error for a key that no section has, naming the nearest one that exists."""
    near = difflib.get_close_matches(name, ALL_KEYS, n=1, cutoff=0.0)
    last = name.rsplit(".", 1)[-1]
    same = sorted(
        (k for k in ALL_KEYS if k.rsplit(".", 1)[-1] == last), key=lambda k: k.count(".")
    )  # train.seed before data.listops.seed
    return UserError(
        f"config.{printable(name)}: unknown key; the nearest known key is config.{(same or near)[0]}"
    )


def parse_value(name: str, text: str) -> Any:
    """The value of `--config.NAME=TEXT` in the type NAME was declared with; raises ConfigError or for an unknown key."""
    if name not in DECLARED:
        raise unknown_key(name)
    return parsed(f"config.{name}", type(DECLARED[name][0]), text)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and validates a Config from nested mappings; keys left out keep their default.

    Raises:
      UserError: an unknown key (with the nearest known one).
      ConfigError: a value of the wrong type, out of range, or inconsistent with another.
    """
    config = _section(Config, values, "")
    check_model(config.model)
    check_run(config)
    return config


def _section(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config.{prefix[:-1]}", values, "this is a section; set the keys inside it"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    out = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(f"{prefix}{name}")
        if dataclasses.is_dataclass(hints[name]):
            out[name] = _section(hints[name], value, f"{prefix}{name}.")
        else:
            out[name] = checked(f"config.{prefix}{name}", hints[name], value, fields[name].metadata)
    return cls(**out)


def with_vocabulary(config: Config, size: int) -> Config:
    """The configuration with the vocabulary size of the data filled in; ConfigError where the model's is too small."""
    given = config.model.vocab_size
    if given and given < size:
        raise ConfigError(
            "config.model.vocab_size",
            given,
            f"the data have {size} tokens; give at least that, or 0",
        )
    check_cutoffs(config.model, given or size)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=given or size)
    )


def changed_keys(old: Config, new: Config, more: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """Keys whose change would change a run: (key, old value, new value) for those not declared `free`, and for `more`.

    train.steps is free, unless it is among `more`, where the schedule's length does not follow it.
    """
    extendable = (
        old.optimizer.decay_steps == new.optimizer.decay_steps > 0 and "train.steps" not in more
    )  # it then only says when to stop
    before = {name: value for name, value, _ in leaves(old)}
    return [
        (name, before[name], value)
        for name, value, meta in leaves(new)
        if before[name] != value
        and (not meta["free"] or name in more)
        and not (name == "train.steps" and extendable)
    ]


def find_config(name: str) -> tuple[Path | epath.Path, str]:
    """(file, variant) of `--config`: a path, or the name of a shipped config, with an optional `:variant`."""
    if "://" in name or os.path.isfile(os.path.expanduser(name)):  # a path may hold a colon
        return epath.Path(os.path.expanduser(name)), ""
    stem, _, variant = name.partition(":")
    here = Path(__file__).parents[1]
    places = (here / "configs", here.parent / "configs")
    shipped = [d / f"{stem}.py" for d in places]
    for path in [Path(os.path.expanduser(stem)), *(shipped if not stem.endswith(".py") else [])]:
        if os.path.isfile(
            path
        ):  # unlike pathlib's, these two raise nothing for a name that cannot be
            return path, variant
    names = sorted(
        {str(p.relative_to(d).with_suffix("")) for d in places for p in d.glob("**/[!_]*.py")}
    )
    raise UserError(
        f"--config={printable(name)}: no such file; give a path, or a shipped config by name ({', '.join(names)})"
    )


def evaluate(
    name: str,
    wanted: str = "it must define get_config() that returns uoe_jax.config.base() with your changes",
) -> dict[str, Any]:
    """What a config file's `get_config` returns, as nested dicts; a .json file holds them.

    Raises:
      UserError: the file cannot be read or run; wanted: the remedy.
    """
    path, variant = find_config(name)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".json":
            return dict(json.loads(data.decode("utf-8-sig")))
        # Of bytes, Python heeds the byte-order mark and a declared encoding.
        source = compile(data, str(path), "exec")
        spec = importlib.util.spec_from_loader("uoe_config", None)
        assert spec is not None  # of a name without a loader there always is one
        module = importlib.util.module_from_spec(spec)
        exec(
            source, module.__dict__
        )  # a config file is a program by design: run only those you trust
        given = module.get_config(variant) if variant else module.get_config()
        return given.to_dict()
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        line = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        at = f" line {line[-1]}" if line else ""
        raise UserError(f"--config={name}:{at} cannot be used ({text}); {wanted}") from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of nested dicts."""
    *parents, last = key.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        values = (
            values if isinstance(values, dict) else {}
        )  # the config file put a value there: from_dict refuses it
    values[last] = value


def validated(values: Mapping[str, Any]) -> Config:
    """The configuration of nested dicts, fit for `uoe train`; raises UserError as `load_config`."""
    config = from_dict(values)
    from uoe_jax.data.registry import known_vocabulary

    size, tokenizer = known_vocabulary(config)
    prompt = config.generate.prompt
    check_training(config, 1 + len(tokenizer.encode(prompt) if tokenizer else prompt.split()))
    with_vocabulary(config, size)
    return config


def load_config(name: str, overrides: dict[str, str]) -> Config:
    """Runs a config file's `get_config`, applies the overrides, validates; what comes out is fit for `uoe train`.

    Raises:
      UserError: the file cannot be read or run; an unknown key; a value that cannot be used.
    """
    values = evaluate(name)
    for key, text in overrides.items():
        put(values, key, parse_value(key, text))
    return validated(values)
