"""README.md is short, the blocks alone run as they are shown, and what the documents point to exists."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

from uoe_jax import cli, config

README = (ROOT / "README.md").read_text()
DOCS = [p for p in (ROOT / "docs").rglob("*.md") if "api" not in p.parts]


def test_it_is_short():
    assert len(README.split()) <= 700


def test_the_blocks_alone():
    text = (ROOT / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["y"].shape == (2, 64, 256)
    assert float(names["stats"].patches) == 128


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(path):
    """Files exist, and a name shown as a link to a source file is defined in it."""
    links = re.findall(r"\[([^\]]*)\]\(([^)#]+)[^)]*\)", path.read_text())
    assert links
    for text, target in links:
        if "://" in target:
            continue
        assert (path.parent / target).exists(), target
        name = text.strip("`").split(".")[-1]
        if target.endswith(".py") and text.startswith("`") and not text.endswith(".py`"):
            assert re.search(rf"(def|class) {name}\b", (path.parent / target).read_text()), (
                text,
                target,
            )


def test_every_key_named_exists():
    for name in re.findall(r"`--config\.([a-z_.]+)=", README):
        config.parse_value(name, "1")
    for command in re.findall(r"uoe (train|eval|generate)", README):
        assert command in cli._parser().format_help()
