"""Lists of keys with values, ranges and meaning: for a terminal, as JSON lines, as Markdown."""

import collections
import dataclasses
import difflib
import fnmatch
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Mapping, NamedTuple

from uoe_jax.config.fields import INT32_MAX, printable
from uoe_jax.config.hints import ALL_KEYS, nearest_key
from uoe_jax.errors import UserError

WIDTH = 100


class Key(NamedTuple):
    """A key of a configuration: dotted name, value, and declaration."""

    name: str
    value: Any
    meta: Mapping[str, Any]

    @property
    def changed(self) -> bool:
        return self.value != self.meta["default"]

    @property
    def doc(self) -> str:
        """The documentation as a sentence."""
        doc = self.meta["doc"]
        return f"{doc[0].upper()}{doc[1:]}."

    @property
    def kind(self) -> type:
        return type(self.meta["default"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bounds that a key does not have are null."""
        names = ("default", "low", "above", "high", "choices", "free", "doc")
        given = {"key": self.name, "type": self.kind.__name__, "value": self.value}
        declared = {name: self.meta[name] for name in names}
        return given | declared | {"choices": list(self.meta["choices"])}


class Section(NamedTuple):
    """A section: dotted name (empty for the whole configuration), class, and its own keys."""

    name: str
    cls: type
    keys: list[Key]

    @property
    def doc(self) -> str:
        return " ".join((self.cls.__doc__ or "").split())


def sections(config: Any, name: str = "") -> Iterator[Section]:
    """Every section of a configuration that has keys of its own."""
    prefix = f"{name}." if name else ""
    values = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    nested = [(field.name, v) for field, v in values if dataclasses.is_dataclass(v)]
    own = [
        Key(prefix + field.name, value, field.metadata)
        for field, value in values
        if not dataclasses.is_dataclass(value)
    ]
    if own:
        yield Section(name, type(config), own)
    for field_name, value in nested:
        yield from sections(value, prefix + field_name)


def selected(config: Any, pattern: str | None, changed: bool) -> list[Section]:
    """The sections with only those keys that match and, if `changed`, differ from their defaults.

    pattern: part of a dotted key, or a glob (`*`, `?`, `[`) of a whole one.

    Raises:
      UserError: the pattern matches no key.
    """
    names = set(ALL_KEYS)
    if pattern is not None:
        glob = pattern if re.search(r"[*?\[]", pattern) else f"*{pattern}*"
        names = set(fnmatch.filter(ALL_KEYS, glob))
        if not names:
            close = difflib.get_close_matches(pattern, ALL_KEYS, n=3)
            near = ", ".join(dict.fromkeys([nearest_key(pattern), *close]))
            raise UserError(f"{printable(pattern)}: no key matches; the nearest are {near}")
    out = []
    for section in sections(config):
        keys = [k for k in section.keys if k.name in names and (k.changed or not changed)]
        if keys:
            out.append(section._replace(keys=keys))
    return out


def as_text(found: list[Section]) -> str:
    """Two lines or more per key, at most 100 columns wide; changed keys are marked by `*`."""
    lines = []
    for section in found:
        lines += ["", *textwrap.wrap(f"[{section.name}] {section.doc}", WIDTH)]
        for key in section.keys:
            free = "  (may change on resume)" if key.meta["free"] else ""
            lines.append(f"{'*' if key.changed else ' '} {key.name} = {_shown(key.value)}{free}")
            about = f"{key.doc} {_range(key)}; default {_shown(key.meta['default'])}."
            lines += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) or "no key is changed from its default"


def as_json(found: list[Section]) -> str:
    """One JSON object per line and key."""
    return "\n".join(json.dumps(key.as_dict()) for section in found for key in section.keys)


def as_markdown(config: Any) -> str:
    """A heading, the docstring and a table for every section; sections of one class share them."""
    by_class: dict[type, list[Section]] = collections.defaultdict(list)
    for section in sections(config):
        by_class[section.cls].append(section)
    lines = []
    for same in by_class.values():
        if same[0].name:
            lines += [f"## {', '.join(f'`{section.name}`' for section in same)}", ""]
        lines += [_escaped(same[0].doc), ""]
        lines += ["| key | default | values | resume | meaning |", "|---|---|---|---|---|"]
        for key in same[0].keys:
            name, free = key.name.rpartition(".")[2], "free" if key.meta["free"] else ""
            cells = (f"`{name}`", f"`{_shown(key.meta['default'])}`", _escaped(_range(key)), free)
            lines.append(f"| {' | '.join(cells)} | {_escaped(key.doc)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value as it is written on the command line; quoted if that would not show all of it."""
    if isinstance(value, bool):
        return str(value).lower()
    plain = not isinstance(value, str) or value.isprintable() and value and " " not in value
    return str(value) if plain else repr(value)


def _range(key: Key) -> str:
    """The values that a key may have."""
    meta, kind = key.meta, key.kind
    if meta["choices"]:
        return f"One of {', '.join(meta['choices'])}"
    if kind in (bool, str):
        return "True or false" if kind is bool else "Text"
    high = None if meta["high"] == INT32_MAX else meta["high"]
    bounds = ((">=", meta["low"]), (">", meta["above"]), ("<=", high))
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
    return f"{'Whole number' if kind is int else 'Number'} {limits}".rstrip()


def _escaped(text: str) -> str:
    """Plain text in a cell of a Markdown table; code between backticks is kept."""
    return re.sub(r"([\\*|]|<(?=\w))", r"\\\1", text)
