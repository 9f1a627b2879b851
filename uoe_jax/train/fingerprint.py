"""Fingerprints of arrays: 32 bits a leaf, computed where the leaf lies, the same on every mesh and number of processes.

A checkpoint stores those of its leaves, since nothing else would notice a flipped bit in an array: neither Orbax nor
TensorStore keeps a checksum of array data.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding


class Fingerprints(NamedTuple):
    """Of the leaves of a tree, by name.

    Attributes:
      words: 8 hex digits for each leaf; of typed PRNG keys, those of their data.
      not_finite: the floating leaves that hold a NaN or an infinity, in the order of the tree.
    """

    words: dict[str, str]
    not_finite: list[str]


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a tree, such as `params/layers/mlp/w`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fingerprints(tree: Any) -> Fingerprints:
    """Fingerprints of a tree of jax.Array that lie on one mesh, in every process the same.

    Any change of one element changes its leaf's fingerprint; any other change does but for one in 2^32. Moves only
    scalars between devices, and waits for the result.
    """
    named = [(leaf_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not named:
        return Fingerprints({}, [])
    of_first = named[0][1].sharding
    everywhere = (
        NamedSharding(of_first.mesh, PartitionSpec())
        if isinstance(of_first, NamedSharding)
        else None
    )
    words, bad = jax.device_get(_compiled(everywhere)([leaf for _, leaf in named]))
    return Fingerprints(
        {name: f"{int(word):08x}" for (name, _), word in zip(named, words)},
        [name for (name, _), is_bad in zip(named, bad) if is_bad],
    )


@functools.cache
def _compiled(everywhere: Sharding | None) -> Any:
    """The fingerprints of a list of leaves, replicated: every process reads them without asking another."""

    def all_of(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        words, bad = zip(*map(_word_and_bad, leaves))
        return jnp.stack(words), jnp.stack(bad)

    return jax.jit(all_of, out_shardings=everywhere)


def _word_and_bad(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(A sum over elements of a hash of (value, index), 1 where an element is not finite), both uint32. Summing modulo 2^32
    knows no order, so any sharding gives the same.

    Not value times a hash of the index: the signs of any two elements could flip unseen.
    """
    bits = _bits(x).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(
        range(bits.ndim)
    ):  # flat, without a reshape: that would gather a sharded array
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    h = bits ^ (index * jnp.uint32(0x9E3779B1))
    h = (h ^ (h >> 16)) * jnp.uint32(
        0x7FEB352D
    )  # each line is one to one, so no change of one value is lost
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    h ^= h >> 16
    bad = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.ones(x.shape, jnp.bool_)
    bad = jnp.broadcast_to(bad.reshape(bad.shape + (1,) * (h.ndim - bad.ndim)), h.shape)
    # Both in one reduction: read once, and compiled in a third of the time of two.
    zero = jnp.uint32(0)
    return jax.lax.reduce(
        (h, (~bad).astype(jnp.uint32)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] | b[1]),
        tuple(range(h.ndim)),
    )


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
