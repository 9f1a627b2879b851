"""Fingerprints of arrays: 32 bits a leaf, the same on every mesh and number of processes.

A checkpoint stores those of its leaves, as nothing else would notice a flipped bit in an array:
neither Orbax nor TensorStore keeps a checksum of array data.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


class Fingerprints(NamedTuple):
    """Of the leaves of a tree, by name."""

    words: dict[str, str]  # 8 hex digits for each leaf; of typed PRNG keys, those of their data
    not_finite: list[str]  # floating leaves with a NaN or an infinity, in the order of the tree


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a tree, such as `params/layers/mlp/w`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fingerprints(tree: Any) -> Fingerprints:
    """Fingerprints of a tree of jax.Array on one mesh; the same in every process.

    Any change of one element changes its leaf's fingerprint; any other change does with probability
    1 - 2^-32. Moves only scalars between devices, and waits for the result.
    """
    named = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    first, replicated = next(iter(named.values())).sharding, None
    if isinstance(first, NamedSharding):
        replicated = NamedSharding(first.mesh, PartitionSpec())
    compiled = jax.jit(_all_words, out_shardings=replicated)  # so that every process can read them
    words, bad = jax.device_get(compiled(list(named.values())))
    hexes = {name: f"{int(word):08x}" for name, word in zip(named, words)}
    return Fingerprints(hexes, [name for name, is_bad in zip(named, bad) if is_bad])


def _all_words(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    words, bad = zip(*map(_word_and_bad, leaves))
    return jnp.stack(words), jnp.stack(bad)


def _word_and_bad(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Sum over elements of a hash of (bits, index), 1 if an element is not finite), both uint32.

    A sum modulo 2^32 has no order, so any sharding gives the same. The hash is not bits times a
    hash of the index: there a flip of any two signs would go unnoticed.
    """
    bits = _bits(x).astype(jnp.uint32)
    # The flat index, without a reshape, which would gather a sharded array.
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    h = bits ^ (index * jnp.uint32(0x9E3779B1))
    # Each line is a bijection, so that no change of one element is lost.
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    h ^= h >> 16
    bad = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.ones(x.shape, jnp.bool_)
    bad = jnp.broadcast_to(bad.reshape(bad.shape + (1,) * (h.ndim - bad.ndim)), h.shape)
    # Both in one reduction: read once, and compiled in a third of the time of two.
    zeros = (jnp.uint32(0), jnp.uint32(0))
    both, axes = (h, (~bad).astype(jnp.uint32)), tuple(range(h.ndim))
    return jax.lax.reduce(both, zeros, lambda a, b: (a[0] + b[0], a[1] | b[1]), axes)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of x as unsigned integers; 64-bit values as two, in one more dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)], axis=-1)
    width = min(8 * x.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
