"""Every shipped config: it loads, its header says what a reader needs, and its train step lowers for every platform."""

from __future__ import annotations

import ast

import jax
import jax.numpy as jnp
import pytest

from helpers import ROOT
from uoe_jax import cli
from uoe_jax import mesh as mesh_lib
from uoe_jax.train.loop import with_vocabulary
from uoe_jax.train.step import build

FILES = sorted((ROOT / "configs").glob("*.py"))


def test_there_are_configs():
    assert [f.stem for f in FILES] and "quickstart" in {f.stem for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_header_is_documentation(path):
    header = ast.get_docstring(ast.parse(path.read_text()))
    for word in ("Command", "Hardware", "Time", "Expected"):
        assert f"{word}:" in header, word
    assert f"configs/{path.name}" in header


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_train_step_lowers_for_every_platform(path):
    """Nothing is allocated or compiled; one device stands for the mesh."""
    config = with_vocabulary(cli.load_config(str(path), {}), 257)
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    rows, length = config.train.batch_size, config.model.context_length
    batch = {k: jax.ShapeDtypeStruct((rows, length), jnp.int32) for k in ("tokens", "targets", "segments", "positions")}
    batch["n_bytes"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        traced = program.train_step.trace(program.abstract, batch)
        for platform in ("cpu", "cuda", "tpu"):
            assert "stablehlo.dot_general" in traced.lower(lowering_platforms=(platform,)).as_text(), platform
