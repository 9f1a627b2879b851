"""Declaration of configuration keys: type, default, range and one sentence of documentation."""

import dataclasses
import functools
import math
import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from uoe_jax.errors import ConfigError

INT32_MAX = 2**31 - 1  # devices count in int32
FLOAT32_TINY = 1.2e-38  # accelerators flush smaller float32 numbers to 0


def key(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Collection[str] = (),
    free: bool = False,
) -> Any:
    """Declares one key: `low <= value <= high`, `value > above`, or one of `choices`."""
    if type(default) is int and high is None:
        high = INT32_MAX
    limits = dict(low=low, high=high, above=above, choices=choices)
    meta = dict(default=default, doc=doc, free=free, **limits)
    return dataclasses.field(default=default, metadata=meta)


free_key = functools.partial(key, free=True)  # may change when a run is resumed


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yields (dotted key, value, declaration) of every key of a section and its subsections."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata


def printable(text: str) -> str:
    """The text on one line: control characters and broken UTF-8 are escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]


def parsed(name: str, text: str, meta: Mapping[str, Any]) -> Any:
    """The text of an override in the type of its key; ConfigError if it does not parse.

    Numbers are written as in Python, in ASCII; underscores and surrounding spaces are allowed.
    """
    kind = type(meta["default"])
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is not str and not text.isascii():
            raise ValueError
        return kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(name, text, f"give {wanted}") from None


def check_declared(prefix: str, config: Any) -> None:
    """Checks every value of a section against its declaration; raises ConfigError."""
    for name, value, meta in leaves(config):
        checked(f"{prefix}.{name}", value, meta)


def checked(name: str, value: Any, meta: Mapping[str, Any]) -> Any:
    """The value, if the declaration of its key allows it; ConfigError otherwise."""
    kind = type(meta["default"])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ConfigError(name, value, f"give a value of type {kind.__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(name, value, f"choose one of {', '.join(meta['choices'])}")
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(name, value, "give a finite number")
    if meta["low"] is not None and value < meta["low"]:
        raise ConfigError(name, value, f"give at least {meta['low']}")
    if meta["above"] is not None and value <= meta["above"]:
        raise ConfigError(name, value, f"give more than {meta['above']}")
    if meta["high"] is not None and value > meta["high"]:
        raise ConfigError(name, value, f"give at most {meta['high']}")
    if kind is not float:
        return value
    if 0 < abs(value) < FLOAT32_TINY:
        raise ConfigError(name, value, f"is 0 in float32; give at least {FLOAT32_TINY}")
    return float(value)


def wrong(section: Any, name: str, remedy: str) -> ConfigError:
    """The error for a dotted key of `model` or of the whole configuration."""
    where = "config" if hasattr(section, "model") else "config.model"
    return ConfigError(f"{where}.{name}", operator.attrgetter(name)(section), remedy)


def must_divide(name: str, n: int) -> str:
    """The remedy for a value that should divide n."""
    return f"must divide {name}={n}: {divisors(n)}"


def divisors(n: int) -> str:
    """The divisors of n, for error messages."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    found = sorted({*low, *(n // d for d in low)})
    return ", ".join(map(str, found[:12])) + (", …" if len(found) > 12 else "")
