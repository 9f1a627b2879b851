"""What README.md shows runs as it stands there."""

from __future__ import annotations

import re

from helpers import ROOT
from uoe_jax import cli

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_config_example(tmp_path):
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    config = cli.load_config(str(tmp_path / "mine.py"), {"train.steps": "100"})
    assert (config.model.uome.n_experts, config.train.steps) == (16, 100)


def test_the_blocks_alone():
    names: dict = {}
    exec(BLOCKS[1], names)
    assert names["y"].shape == (2, 64, 256)
    assert float(names["stats"].patches) == 128


def test_every_key_named_exists():
    for name in re.findall(r"`--config\.([a-z_.]+)=", README):
        cli.config_lib.parse_value(name, "1")
    for command in re.findall(r"uoe (train|eval|generate)", README):
        assert command in cli._parser().format_help()
