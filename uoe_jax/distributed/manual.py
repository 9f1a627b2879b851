"""The manual region of a block: what one device does of it, and the collectives around that.

`run` cuts a block's work by `jax.shard_map` over all mesh axes: rows over the batch axes, experts (or heads, hidden units,
vocabulary) over `expert`. Inside, weights are gathered over `fsdp`, inputs are gathered, and partial outputs are reduced
by the one reduction over `expert`. Nothing is left to the compiler's partitioner, which would gather activations over the
data axes. On one device there is no region, and the same code runs on everything.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.mesh import BATCH_AXES, EVERYWHERE, ROWS


class Region(NamedTuple):
    """Where the code of a block runs: one shard of `num_shards` over `expert` in a manual region, or (num_shards=0) outside of any.

    sequence_parallel: activations come and go cut along L over `expert`.
    """

    num_shards: int = 0
    sequence_parallel: bool = False

    @property
    def shard_index(self) -> jax.Array | int:
        """Which part this is."""
        return jax.lax.axis_index("expert") if self.num_shards else 0

    def gather_inputs(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All tokens of the rows: (for what every part computes alike, for what each computes for itself).

        Both have the same values. They differ in their gradients: those of the second are added over the parts, once.
        """
        if not self.num_shards:
            return x_BLD, x_BLD
        if self.sequence_parallel:
            return _gather_tokens(x_BLD)
        return x_BLD, self.as_varying(x_BLD)

    def as_varying(self, a: jax.Array) -> jax.Array:
        """What all parts have alike, for what each computes for itself: its gradient is added over the parts, once and
        as small as it is here."""
        return jax.lax.pcast(a, "expert", to="varying") if self.num_shards else a

    def reduce_outputs(self, y_BLD: jax.Array) -> jax.Array:
        """The sum over the parts: the one reduction of a block."""
        if not self.num_shards:
            return y_BLD
        if self.sequence_parallel:
            return jax.lax.psum_scatter(y_BLD, "expert", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_BLD, "expert")

    def local_tokens(self, a_BL: jax.Array) -> jax.Array:
        """Of values [B,L,…] known for all tokens, those whose activations this part has between blocks."""
        if not self.sequence_parallel:
            return a_BL
        l, rest = divmod(a_BL.shape[1], self.num_shards)
        assert not rest, (a_BL.shape, self.num_shards)
        return jax.lax.dynamic_slice_in_dim(a_BL, self.shard_index * l, l, axis=1)

    def weight_for_local_tokens(self, w: nnx.Variable | None) -> jax.Array | None:
        """A weight that all parts have, if there is one, for use after they left: its gradient is then added over the
        parts as it is here, and not broadcast over tokens."""
        if w is None:
            return None
        return self.as_varying(w[...]) if self.sequence_parallel else w[...]


WHOLE = Region()


def run(
    f: Callable[..., tuple[jax.Array, Any]],
    weights: Any,
    x: jax.Array,
    tokens: Any = None,
    *,
    dtype: Any,
    enters: bool = True,
    cut_last: bool = False,
    on_local_tokens: bool = False,
) -> tuple[jax.Array, Any]:
    """`f(weights, x, tokens, region)` on every device's share, or on everything where there is one device.

    Args:
      f: returns (activations of this share, sums over its rows or None).
      weights: a tree of `nnx.Variable` (layers.common.weight); `f` gets them whole but for what lies on `expert`.
      x: activations [B,L,D] as they lie between blocks, or (enters=False) values [B,L] of all tokens.
      tokens: a tree of arrays with rows in front.
      dtype: of the computation, in which weights cross `fsdp` unless they are `exact`.
      cut_last: the result [B,L,X] has all tokens and is cut over `expert` along X.
      on_local_tokens: the weights are not cut over `expert` and are used on a part's own tokens.

    Returns:
      (what `f` returned for all rows, its sums over all rows).
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return f(weights, x, tokens, WHOLE)
    region = Region(mesh.shape["expert"], mesh_lib.is_sequence_parallel(mesh))
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda w: isinstance(w, nnx.Variable))
    specs = [mesh_lib.weight_spec(mesh, w.logical_axes, w.shape) for w in leaves]
    over = ("expert",) if on_local_tokens and region.sequence_parallel else ()

    def share(parts: list[jax.Array], x: jax.Array, tokens: Any) -> tuple[jax.Array, Any]:
        whole = [
            w.replace(gathered(a, spec, a.dtype if w.exact else dtype, over))
            for w, a, spec in zip(leaves, parts, specs)
        ]
        y, sums = f(jax.tree.unflatten(tree, whole), x, tokens, region)
        return y, jax.tree.map(lambda a: jax.lax.psum(a, BATCH_AXES), sums)

    between = mesh_lib.activations(mesh)
    out = PartitionSpec(BATCH_AXES, None, "expert") if cut_last else between
    shares = jax.shard_map(
        share, in_specs=(specs, between if enters else ROWS, ROWS), out_specs=(out, EVERYWHERE)
    )
    return shares([w[...] for w in leaves], x, tokens)


def gathered(w: jax.Array, spec: PartitionSpec, dtype: Any, over: tuple[str, ...]) -> jax.Array:
    """Inside the region: this device's part of a weight, whole over `fsdp`, which it crosses in `dtype`.

    Cast to varying over the other batch axes (and those of `over`) first: the gradient is then scattered over `fsdp`, in
    the weight's own dtype, before it crosses them.
    """
    if "fsdp" not in spec:
        return jax.lax.pcast(w, (*BATCH_AXES, *over), to="varying")
    return _gather_weight(
        jax.lax.pcast(w, ("replica", "data", *over), to="varying"), spec.index("fsdp"), dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_weight(w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(w.astype(dtype), "fsdp", axis=axis, tiled=True)


def _scatter_gradient(axis: int, dtype: Any, _: None, d: jax.Array) -> tuple[jax.Array]:
    return (
        jax.lax.psum_scatter(d.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),
    )


_gather_weight.defvjp(
    lambda w, axis, dtype: (_gather_weight(w, axis, dtype), None), _scatter_gradient
)


@jax.custom_vjp
def _gather_tokens(x_BlD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Region.gather_inputs` from tokens that are cut over `expert`: one all-gather for both, and back one reduce-scatter."""
    shared_BLD = jax.lax.all_gather(x_BlD, "expert", axis=1, tiled=True, to="invarying")
    return shared_BLD, jax.lax.pcast(shared_BLD, "expert", to="varying")


def _scatter_tokens(_: None, d: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    d_shared_BLD, d_own_BLD = d
    l = d_own_BLD.shape[1] // jax.lax.axis_size("expert")
    mine_BlD = jax.lax.dynamic_slice_in_dim(
        d_shared_BLD, l * jax.lax.axis_index("expert"), l, axis=1
    )
    return (mine_BlD + jax.lax.psum_scatter(d_own_BLD, "expert", scatter_dimension=1, tiled=True),)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), _scatter_tokens)
