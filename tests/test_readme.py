"""What README.md shows runs as it stands there, and what the documents point to exists."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

from uoe_jax import cli, config

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_config_example(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    found = cli.load_config(str(tmp_path / "mine.py"), {"train.steps": "100"})
    assert (found.model.uome.n_experts, found.train.steps) == (16, 100)


def test_the_blocks_alone():
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["y"].shape == (2, 64, 256)
    assert float(names["stats"].patches) == 128


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
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
