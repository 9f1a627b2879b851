"""The golden vectors of the baselines, and blocks that hold their weights."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax import config as config_lib
from uoe_jax.config import ModelConfig
from uoe_jax.models.decoder import make_attention, make_mlp

GOLDEN = pathlib.Path(__file__).parent / "golden" / "baselines"


def load(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    g = dict(np.load(GOLDEN / f"{name}.npz"))
    return config_lib.from_dict({"model": json.loads(str(g["config"]))}).model, g


def make(c: ModelConfig) -> nnx.Module:
    """The block that is compared: the one that the configuration does not leave at its default."""
    return (make_mlp if c.mlp != "uome" else make_attention)(c, nnx.Rngs(0))


def split(c: ModelConfig, w: dict[str, np.ndarray]) -> tuple[nnx.GraphDef, nnx.State]:
    """The block with the weights of a golden file, all of which it must have."""
    graphdef, state = nnx.split(make(c))
    flat = {".".join(path): value for path, value in nnx.to_flat_state(state)}
    assert set(flat) == set(w)
    for name, value in w.items():
        assert flat[name].shape == value.shape, name
        flat[name].value = jnp.asarray(value)
    return graphdef, state


def under(g: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value for name, value in g.items() if name.startswith(prefix)
    }
