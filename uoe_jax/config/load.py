"""Reads a configuration: from a config file, from the `config.json` of a run, or from dicts."""

import dataclasses
import json
import os
import traceback
import types
from pathlib import Path
from typing import Any, Mapping, Sequence

from etils import epath

from uoe_jax.config.fields import checked, leaves, parsed, printable
from uoe_jax.config.hints import DECLARED, unknown_key
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_model, check_run, check_vocabulary
from uoe_jax.errors import ConfigError, UserError

GET_CONFIG = "it must define get_config() that returns uoe_jax.config.base() with your changes"


def base() -> Any:
    """An `ml_collections.ConfigDict` of all keys at their defaults, for a config file to change."""
    from ml_collections import ConfigDict

    return ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def parse_value(name: str, text: str) -> Any:
    """The value of `--config.NAME=TEXT` in the type of its key; UserError where there is none."""
    if name not in DECLARED:
        raise unknown_key(name)
    return parsed(f"config.{name}", text, DECLARED[name])


def from_dict(values: Mapping[str, Any]) -> Config:
    """The validated Config of nested mappings, other keys at their defaults. Raises UserError."""
    config = _section(Config(), values, "")
    check_model(config.model)
    check_run(config)
    return config


def _section(default: Any, values: Any, prefix: str) -> Any:
    """`default` with the values of a mapping; prefix: its dotted name, with a dot behind."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{prefix[:-1]}", values, "this is a section; set its keys")
    fields = {f.name: f for f in dataclasses.fields(default)}
    out = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_key(f"{prefix}{name}")
        old, dotted = getattr(default, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(old):
            out[name] = _section(old, value, f"{dotted}.")
        else:
            out[name] = checked(f"config.{dotted}", value, fields[name].metadata)
    return dataclasses.replace(default, **out)


def with_vocabulary(config: Config, size: int) -> Config:
    """Fills in the vocabulary size of the data; ConfigError if that of the model is too small."""
    check_vocabulary(config.model, size)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or size)
    return dataclasses.replace(config, model=model)


def changed_keys(old: Config, new: Config, more: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every changed key that would change the run.

    These are the keys not declared `free`, and those in `more`. train.steps and
    optimizer.decay_steps are free where the schedule ends at the same step, unless in `more`.
    """
    free = {name for name, meta in DECLARED.items() if meta["free"]}
    if old.decay_steps == new.decay_steps:
        free |= {"train.steps", "optimizer.decay_steps"}
    free -= {*more}
    both = zip(leaves(old), leaves(new))
    changed = [(name, before, now) for (name, before, _), (_, now, _) in both if before != now]
    return [change for change in changed if change[0] not in free]


# --- config files ---


def find_config(name: str) -> tuple[Path | epath.Path, str]:
    """(file, variant) of `--config`: a path or the name of a shipped config, and `:variant`."""
    if "://" in name or os.path.isfile(os.path.expanduser(name)):  # a path may hold a colon
        return epath.Path(os.path.expanduser(name)), ""
    stem, _, variant = name.partition(":")
    package = Path(__file__).parents[1]
    folders = (package / "configs", package.parent / "configs")
    for path in (Path(os.path.expanduser(stem)), *(folder / f"{stem}.py" for folder in folders)):
        if os.path.isfile(path):  # unlike Path.is_file, it raises for no name
            return path, variant
    files = ((folder, file) for folder in folders for file in folder.glob("**/[!_]*.py"))
    names = sorted({str(file.relative_to(folder).with_suffix("")) for folder, file in files})
    given = f"--config={printable(name)}: no such file"
    raise UserError(f"{given}; give a path, or a shipped config by name ({', '.join(names)})")


def evaluate(name: str, remedy: str = GET_CONFIG) -> dict[str, Any]:
    """The nested dicts of a config file's `get_config` or of a .json file.

    remedy: ends the UserError for a file that cannot be read or run.
    """
    path, variant = find_config(name)
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".json":
            return dict(json.loads(data.decode("utf-8-sig")))
        # Compiled from bytes, so that a byte-order mark and a declared encoding count.
        source = compile(data, str(path), "exec")
        module = types.ModuleType("uoe_config")
        exec(source, module.__dict__)  # a config file is a program: run only those you trust
        given = module.get_config(variant) if variant else module.get_config()
        return given.to_dict()
    except UserError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)]
        at = f" line {line[-1]}" if line else ""
        raise UserError(f"--config={name}:{at} cannot be used ({text}); {remedy}") from error


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key of nested dicts."""
    *parents, last = key.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):  # a value in place of a section: from_dict refuses it
            return
    values[last] = value


def resolve(name: str | None, overrides: Mapping[str, str]) -> Config:
    """The configuration of `--config` (None: the defaults) with overrides. Raises UserError."""
    values = to_dict(Config()) if name is None else evaluate(name)
    if "base" in values and "rows" in values:
        raise UserError(f"--config={name}: is a table of architectures; use uoe compare")
    for key, text in overrides.items():
        put(values, key, parse_value(key, text))
    return from_dict(values)
