"""Lists of keys with values, ranges and meaning: for a terminal, as JSON lines, as Markdown."""

import difflib
import fnmatch
import itertools
import json
import operator
import re
import textwrap
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

from uoe_jax.config.fields import INT32_MAX, leaves, printable
from uoe_jax.config.hints import ALL_KEYS, nearest_key
from uoe_jax.config.schema import Config
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

    @property
    def range(self) -> str:
        """The values that the key may have."""
        if self.meta["choices"]:
            return f"One of {', '.join(self.meta['choices'])}"
        if self.kind in (bool, str):
            return "True or false" if self.kind is bool else "Text"
        bounds = ((">=", self.meta["low"]), (">", self.meta["above"]), ("<=", self.meta["high"]))
        given = [(sign, bound) for sign, bound in bounds if bound not in (None, INT32_MAX)]
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in given)
        return f"{'Whole number' if self.kind is int else 'Number'} {limits}".rstrip()


def selected(config: Any, pattern: str | None, changed: bool) -> list[Key]:
    """The keys that match and, if `changed`, differ from their defaults.

    pattern: part of a dotted key, or a glob (`*`, `?`, `[`) of a whole one; UserError where it
    matches no key.
    """
    glob = pattern or "*"
    names = set(fnmatch.filter(ALL_KEYS, glob if re.search(r"[*?\[]", glob) else f"*{glob}*"))
    if not names:
        close = difflib.get_close_matches(glob, ALL_KEYS, n=3)
        near = ", ".join(dict.fromkeys([nearest_key(glob), *close]))
        raise UserError(f"{printable(glob)}: no key matches; the nearest are {near}")
    keys = (Key(*leaf) for leaf in leaves(config))
    return [key for key in keys if key.name in names and (key.changed or not changed)]


def _sections(config: Any, keys: Iterable[Key]) -> Iterator[tuple[str, str, list[Key]]]:
    """(dotted name, documentation, keys) of every section that has some of these keys."""
    for name, own in itertools.groupby(keys, lambda key: key.name.rpartition(".")[0]):
        section = operator.attrgetter(name)(config) if name else config
        yield name, " ".join(section.__doc__.split()), [*own]


def as_text(found: list[Key]) -> str:
    """Two lines or more per key, at most 100 columns wide; changed keys are marked by `*`."""
    lines = []
    for name, doc, keys in _sections(Config(), found):
        lines += ["", *textwrap.wrap(f"[{name}] {doc}", WIDTH)]
        for key in keys:
            free = "  (may change on resume)" if key.meta["free"] else ""
            lines.append(f"{'*' if key.changed else ' '} {key.name} = {_shown(key.value)}{free}")
            about = f"{key.doc} {key.range}; default {_shown(key.meta['default'])}."
            lines += textwrap.wrap(about, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) or "no key is changed from its default"


def as_json(found: list[Key]) -> str:
    """One JSON object per line and key; bounds that a key does not have are null."""
    lines = []
    for key in found:
        names = ("default", "low", "above", "high", "choices", "free", "doc")
        declared = {name: key.meta[name] for name in names}
        declared["choices"] = list(declared["choices"])
        given = {"key": key.name, "type": key.kind.__name__, "value": key.value}
        lines.append(json.dumps(given | declared))
    return "\n".join(lines)


def as_markdown(config: Any) -> str:
    """A heading, the docstring and a table for every section; sections of one class share them."""
    by_doc: dict[str, dict[str, list[Key]]] = {}
    for name, doc, keys in _sections(config, (Key(*leaf) for leaf in leaves(config))):
        by_doc.setdefault(doc, {})[name] = keys
    lines = []
    for doc, same in by_doc.items():
        if any(same):
            lines += [f"## {', '.join(f'`{name}`' for name in same)}", ""]
        lines += [_escaped(doc), ""]
        lines += ["| key | default | values | resume | meaning |", "|---|---|---|---|---|"]
        for key in next(iter(same.values())):
            name, free = key.name.rpartition(".")[2], "free" if key.meta["free"] else ""
            cells = (f"`{name}`", f"`{_shown(key.meta['default'])}`", _escaped(key.range), free)
            lines.append(f"| {' | '.join(cells)} | {_escaped(key.doc)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value as it is written on the command line; quoted if that would not show all of it."""
    if isinstance(value, bool):
        return str(value).lower()
    plain = not isinstance(value, str) or value.isprintable() and value and " " not in value
    return str(value) if plain else repr(value)


def _escaped(text: str) -> str:
    """Plain text in a cell of a Markdown table; code between backticks is kept."""
    return re.sub(r"([\\*|]|<(?=\w))", r"\\\1", text)
