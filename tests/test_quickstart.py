"""The shipped quickstart, for a few of its steps on the interpreter's own sources."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from uoe_jax import cli
from uoe_jax.data.pipeline import TrainBatches
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.train.evaluate import evaluate
from uoe_jax.train.main import load_data
from uoe_jax.train.step import build


@pytest.mark.slow
def test_it_learns_and_serves_every_quarter_of_the_row_alike():
    """After 60 steps: far better than knowing nothing, and the share of choices kept at least 0.9 of the mean everywhere."""
    config, data = load_data(cli.load_config("quickstart", {"mesh.data": "1"}))
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.init(jax.random.key(config.train.seed))
        batches = TrainBatches(data.train, config.train.batch_size, config.train.seed)
        for step in range(60):
            state, _ = program.train_step(state, mesh_lib.put_batch(mesh, batches[step]))
        found, _ = evaluate(program, state.params, data.validation, config, limit=8, whole=False)
    assert found["eval/bits_per_byte"] < 4.0
    assert (
        max(found["eval/uome/dropped"]) > 0
    )  # the capacity binds, so that the next line says something
    for block in ("smha", "uome"):
        assert np.min(found[f"eval/{block}/kept_by_quarter"]) >= 0.9
