"""Every shipped config: it loads, its header says what a reader needs, and its train step lowers for every platform."""

from __future__ import annotations

import ast
import math

import jax
import pytest
from helpers import ROOT, slow

from uoe_jax import cli
from uoe_jax.compare.table import load_table
from uoe_jax.config import with_vocabulary
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.train.step import build

FILES = sorted((ROOT / "configs").glob("*.py"))
TABLES = sorted((ROOT / "configs" / "compare").glob("*.py"))
AT_ONCE = ("quickstart", "imagenet")
KINDS = (*AT_ONCE, "uoe_7b", "wikitext103", "lra_retrieval", "lra_pathfinder")


def test_there_are_configs():
    assert [f.stem for f in FILES] and "quickstart" in {f.stem for f in FILES}


@pytest.mark.parametrize("path", [*FILES, *TABLES], ids=lambda p: p.stem)
def test_the_header_is_documentation(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    for word in ("Command", "Hardware", "Time", "Expected"):
        assert f"{word}:" in header, word
    assert (
        f"configs/{path.name}" in header
        or f"--config={path.stem} " in header
        or f"--config=compare/{path.stem} " in header
    )


def vocab_size(model) -> int:
    """A vocabulary size that the model allows; 0 for images."""
    largest = max(model.cutoff_list, default=0)
    return 0 if model.stem == "image" else max(257, largest + 1000)


def loaded(path, overrides):
    """The config with a vocabulary as large as that of its data, or larger."""
    config = cli.load_config(str(path), overrides)
    return with_vocabulary(config, config.model.vocab_size or vocab_size(config.model))


def lowers(config, n_devices: int) -> None:
    """The train step lowers for every platform on an abstract mesh: no devices, no data, nothing allocated or compiled."""
    mesh = mesh_lib.abstract_mesh(config.mesh, n_devices)
    with jax.sharding.use_abstract_mesh(mesh):
        program = build(config, mesh)
        traced = program.train_step.trace(program.abstract, program.abstract_batch)
        for platform in ("cpu", "cuda", "tpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo.dot_general" in text and ("all_reduce" in text) == (n_devices > 1), (
                platform
            )


@pytest.mark.parametrize(
    "path",
    [p if p.stem in ("quickstart", "uoe_1b", "cifar10") else slow(p) for p in FILES],
    ids=lambda p: p.stem,
)
def test_the_train_step_lowers_for_every_platform(path):
    """On the mesh of the file; an axis of -1 has two devices."""
    config = loaded(path, {})
    sizes = [getattr(config.mesh, axis) for axis in mesh_lib.AXES]
    lowers(config, math.prod(2 if size == -1 else size for size in sizes))


@pytest.mark.parametrize(
    "path",
    [p if p.stem in AT_ONCE else slow(p) for p in FILES if p.stem in KINDS],
    ids=lambda p: p.stem,
)
def test_it_lowers_on_every_axis_at_once(path):
    axes = {f"mesh.{axis}": "2" for axis in mesh_lib.AXES} | {
        "mesh.sequence_parallel": "true",
        "data.buckets": "1",
        "train.batch_size": "16",
    }
    lowers(loaded(path, axes), 16)


def architectures() -> list[tuple[str, str]]:
    """(table, row) of every pair of blocks that a shipped table compares, once."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for path in TABLES:
        for row in load_table(f"compare/{path.stem}", {}).rows:
            found.setdefault(
                (row.config.model.attention, row.config.model.mlp), (path.stem, row.name)
            )
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("table, name", architectures())
def test_every_compared_architecture_lowers(table, name):
    """At the size of its table, on a mesh of two devices."""
    row = next(row for row in load_table(f"compare/{table}", {}).rows if row.name == name)
    lowers(with_vocabulary(row.config, vocab_size(row.config.model)), 2)
