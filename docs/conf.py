"""How these pages are built: `python -m sphinx -W --keep-going -b html docs build/docs`.

The Markdown is written to be read in the repository as well. Links to source files are made at build
time: they lead to the source as the API reference shows it.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import sys
import textwrap
from typing import Any

from docutils import nodes
from flax import nnx
from sphinx.addnodes import download_reference
from sphinx.util.inspect import signature as signature_of
from sphinx.util.inspect import stringify_signature

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from uoe_jax import __version__  # noqa: E402

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
    app.connect("doctree-read", _link_source, priority=400)  # before downloads are collected
    app.connect("autodoc-skip-member", _skip_aliases)
    app.connect("autodoc-process-signature", _signature)
