"""States to save, and how two of them are compared bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding


def bits_state(seed: int, n: int = 64) -> dict[str, jax.Array]:
    """Incompressible: n random words and a typed key."""
    return {
        "words": jax.random.bits(jax.random.key(seed), (n,), jnp.uint32),
        "key": jax.random.key(seed),
    }


def abstract(state, dtype=None):
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=one), state
    )


def assert_same_bits(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
