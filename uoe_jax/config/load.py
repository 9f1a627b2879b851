"""Config files: Python programs that make a configuration, or the `config.json` of a run; no jax."""

from __future__ import annotations

import importlib.util
import json
import os
import traceback
from pathlib import Path
from typing import Any, Mapping

from etils import epath

from uoe_jax import config as config_lib
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_training
from uoe_jax.errors import UserError


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
        f"--config={config_lib.printable(name)}: no such file; give a path, or a shipped config by name ({', '.join(names)})"
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
    config = config_lib.from_dict(values)
    from uoe_jax.data.registry import known_vocabulary

    size, tokenizer = known_vocabulary(config)
    prompt = config.generate.prompt
    check_training(config, 1 + len(tokenizer.encode(prompt) if tokenizer else prompt.split()))
    config_lib.with_vocabulary(config, size)
    return config


def load_config(name: str, overrides: dict[str, str]) -> Config:
    """Runs a config file's `get_config`, applies the overrides, validates; what comes out is fit for `uoe train`.

    Raises:
      UserError: the file cannot be read or run; an unknown key; a value that cannot be used.
    """
    values = evaluate(name)
    for key, text in overrides.items():
        put(values, key, config_lib.parse_value(key, text))
    return validated(values)
