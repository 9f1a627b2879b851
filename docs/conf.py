"""How these pages are built: `python -m sphinx -W --keep-going -b html docs build/docs`.

The Markdown is written to be read in the repository as well. Two things are made at build time: the tables of keys in
configs.md, from the declarations of the keys, and links to source files, which lead to the source as the API reference shows it.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import inspect
import pathlib
import re
import sys
import textwrap
from typing import Any, Iterator

from docutils import nodes
from flax import nnx
from sphinx.addnodes import download_reference
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from uoe_jax import __version__  # noqa: E402
from uoe_jax.compare.table import TableConfig  # noqa: E402
from uoe_jax.config import Config  # noqa: E402

project = "uoe_jax"
release = version = __version__
copyright = "the authors of uoe_jax; Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"uoe_jax {version}"
html_show_sourcelink = False
myst_heading_anchors = 3
default_role = "code"  # docstrings have Markdown's single backticks
napoleon_use_ivar = (
    True  # attributes of a named tuple are described once, where its docstring has them
)
napoleon_attr_annotations = False  # the signature has their types
napoleon_use_param = False  # several arguments may share a line
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "special-members": "__call__"}


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, dataclass instance) of a configuration and of every section in it."""
    yield prefix, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _sections(value, f"{prefix}.{field.name}".lstrip("."))


def _escaped(text: str) -> str:
    """Plain text, but for code between backticks, in a cell of a Markdown table."""
    return re.sub(r"([\\*_\[\]<>|])", r"\\\1", text)


def _range(meta: Any, kind: type) -> str:
    """The values a key may have, in words."""
    if meta["choices"]:
        return ", ".join(f"`{choice}`" for choice in meta["choices"])
    if kind in (bool, str):
        return {bool: "true or false", str: "text"}[kind]
    low = (
        f"≥ {meta['low']:g}"
        if meta["low"] is not None
        else f"> {meta['above']:g}"
        if meta["above"] is not None
        else ""
    )
    high = f"≤ {meta['high']:g}" if meta["high"] is not None and meta["high"] < 2**31 - 1 else ""
    return ("whole number " if kind is int else "number ") + ", ".join(filter(None, (low, high)))


def _table(section: Any) -> list[str]:
    lines = ["| key | default | values | resume | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not dataclasses.is_dataclass(value):
            meta = field.metadata
            shown = str(value).lower() if isinstance(value, bool) else value
            default = f"`{shown}`" if shown != "" else "empty"
            kept = "free" if meta["free"] else ""
            lines.append(
                f"| `{field.name}` | {default} | {_range(meta, type(value))} | {kept} | {_escaped(meta['doc'])} |"
            )
    return lines if len(lines) > 2 else []


def key_tables() -> str:
    """A heading, the docstring and a table for every section of the configuration; sections of one class stand together."""
    by_class: dict[type, list[tuple[str, Any]]] = collections.defaultdict(list)
    for name, section in _sections(Config()):
        by_class[type(section)].append((name, section))
    lines = []
    for cls, found in by_class.items():
        table = _table(found[0][1])
        if table:
            names = ", ".join(f"`{name}`" for name, _ in found)
            about = _escaped(" ".join((cls.__doc__ or "").split()))
            lines += [
                f"### {names}",
                "",
                *([about, ""] if not about.startswith(cls.__name__) else []),
                *table,
                "",
            ]
    return "\n".join(lines)


def _fill_in(app: Any, docname: str, source: list[str]) -> None:
    """Tables of keys take the place of their comments."""
    if docname == "configs":
        for mark, text in (
            ("<!-- all keys -->", key_tables()),
            ("<!-- keys of a table -->", "\n".join(_table(TableConfig()))),
        ):
            assert source[0].count(mark) == 1, mark
            source[0] = source[0].replace(mark, text)


def _link_source(app: Any, doctree: nodes.document) -> None:
    """A link to a source file of the package leads to its page among the sources; other files stay downloads."""
    here = pathlib.Path(app.env.doc2path(app.env.docname)).parent
    for node in list(doctree.findall(download_reference)):
        path = (here / node["reftarget"]).resolve()
        module = (
            path.relative_to(ROOT).with_suffix("")
            if path.is_relative_to(ROOT / "uoe_jax")
            else None
        )
        if (
            module is not None and path.suffix == ".py" and module.name != "modeling_uoe"
        ):  # torch is not needed to build this
            uri = app.builder.get_relative_uri(app.env.docname, f"_modules/{module.as_posix()}")
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def _skip_aliases(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Fields of a named tuple have no docstring of their own."""
    return (
        True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None
    )


class _Code(str):
    """A default as it is written."""

    __repr__ = str.__str__


def _signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """That of a module's `__init__`, which Flax's metaclass hides."""
    if what != "class" or not issubclass(obj, nnx.Module) or "__init__" not in vars(obj):
        return None
    written = ast.parse(textwrap.dedent(inspect.getsource(obj.__init__))).body[0].args
    defaults = {
        a.arg: _Code(ast.unparse(d))
        for a, d in zip(written.kwonlyargs, written.kw_defaults)
        if d is not None
    }
    found = signature_of(obj.__init__, bound_method=True)
    shown = [p.replace(default=defaults.get(p.name, p.default)) for p in found.parameters.values()]
    return stringify_signature(
        found.replace(parameters=shown), show_return_annotation=False, unqualified_typehints=True
    ), ""


def setup(app: Any) -> None:
    app.connect("source-read", _fill_in)
    app.connect("doctree-read", _link_source, priority=400)  # before downloads are collected
    app.connect("autodoc-skip-member", _skip_aliases)
    app.connect("autodoc-process-signature", _signature)
