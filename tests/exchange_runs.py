"""Workdirs with a checkpoint of random weights, and their import and export."""

from __future__ import annotations

import json

import jax
import numpy as np

from uoe_jax import cli
from uoe_jax.config import Config, from_dict, to_dict
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.step import build

LLAMA = dict(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=64, context_length=32, vocab_size=300, activation="swiglu",
             attention="dense", mlp="dense", tie_embeddings=False)  # fmt: skip

CUT = ["--experts=2", "--k=2"]


def config_of(**model) -> Config:
    return from_dict({"model": model, "train": {"batch_size": 8}})


def run_of(config: Config, place) -> dict:
    """A workdir with the checkpoint of step 0, every weight drawn; returns the parameters."""
    mesh = mesh_lib.make_mesh(config.mesh)
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh), CheckpointStore(place) as store:
        abstract = build(config, mesh).abstract.params
        params = jax.tree.map(
            lambda a: jax.device_put((0.3 * rng.normal(size=a.shape)).astype(a.dtype), a.sharding),
            abstract,
        )
        store.save(0, {"params": params})
    (place / "config.json").write_text(json.dumps(to_dict(config)))
    return params


def exported(place, out, *more: str) -> int:
    return cli.main(["export", f"--workdir={place}", "--format=hf", f"--out={out}", *more])


def imported(source, run, *more: str) -> int:
    return cli.main(["import", f"--from={source}", f"--workdir={run}", *(more or CUT)])
