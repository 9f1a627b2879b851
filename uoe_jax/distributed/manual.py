"""The manual region of a block: what one device computes, and the collectives around it.

`run` shards a block by `jax.shard_map` over all mesh axes: rows over the batch axes; experts,
heads, hidden units or vocabulary entries over `expert`. Inside, weights are all-gathered over
`fsdp`, and partial outputs are summed by the one reduction over `expert`. Nothing is left to the
compiler's partitioner, which would all-gather activations over the data axes. On one device there
is no region, and the same code runs on everything. Letters in `layers.common`.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.mesh import BATCH_AXES, EVERYWHERE, ROWS


class Region(NamedTuple):
    """Where a block's code runs: one shard of the manual region, or outside of it."""

    num_shards: int = 0  # over `expert`; 0: outside
    sequence_parallel: bool = False  # between blocks, activations are sharded along L over `expert`

    @property
    def shard_index(self) -> Array | int:
        return jax.lax.axis_index("expert") if self.num_shards else 0

    def gather_inputs(self, x_BLD: Array) -> tuple[Array, Array]:
        """All tokens, twice: for what every shard computes alike, and for what each computes alone.

        The values are the same; the gradient of the second is summed over the shards.
        """
        if self.sequence_parallel:
            return _gather_tokens(x_BLD)
        return x_BLD, self.as_varying(x_BLD)

    def as_varying(self, a: Array) -> Array:
        """A value all shards have alike, for each to use alone: sums its gradient over them."""
        return jax.lax.pcast(a, "expert", to="varying") if self.num_shards else a

    def reduce_outputs(self, y_BLD: Array) -> Array:
        """The sum over the shards: the one reduction of a block."""
        if self.sequence_parallel:
            return jax.lax.psum_scatter(y_BLD, "expert", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_BLD, "expert") if self.num_shards else y_BLD

    def local_tokens(self, a_BL: Array) -> Array:
        """Values [B,L,…] of all tokens, cut to the tokens this shard holds between blocks."""
        if not self.sequence_parallel:
            return a_BL
        l, rest = divmod(a_BL.shape[1], self.num_shards)
        assert not rest, (a_BL.shape, self.num_shards)
        return jax.lax.dynamic_slice_in_dim(a_BL, self.shard_index * l, l, axis=1)

    def weight_for_local_tokens(self, w: nnx.Variable | None) -> Array | None:
        """A weight all shards hold, used on local tokens: sums its gradient over the shards."""
        if w is None:
            return None
        return self.as_varying(w[...]) if self.sequence_parallel else w[...]


WHOLE = Region()


def run(
    f: Callable[[Any, Array, Any, Region], tuple[Array, Any]],
    weights: Any,
    x: Array,
    tokens: Any = None,
    *,
    dtype: Any,
    ids: bool = False,
    shard_last: bool = False,
    on_local_tokens: bool = False,
) -> tuple[Array, Any]:
    """`f(weights, x, tokens, region)` on every device's shard, or on everything on one device.

    Args:
      f: returns (activations of this shard, sums over its rows or None).
      weights: a module, or a tree of `nnx.Variable`; `f` gets what is not sharded over `expert`
        whole.
      x: activations [B,L,D], sharded as between blocks; or (ids) values [B,L] of all tokens.
      tokens: a tree of arrays whose first axis is rows.
      dtype: compute dtype, in which weights are gathered over `fsdp` unless they are `exact`.
      shard_last: the result [B,L,X] has all tokens and is sharded over `expert` along X.
      on_local_tokens: no weight is sharded over `expert`; they are used on a shard's own tokens.

    Returns what `f` returned: for all rows, and summed over all rows.
    """
    mesh = mesh_lib.current()
    if mesh is None:
        return f(weights, x, tokens, WHOLE)
    between = mesh_lib.activations(mesh)
    region = Region(mesh.shape["expert"], sequence_parallel="expert" in between)
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda w: isinstance(w, nnx.Variable))
    specs = [mesh_lib.weight_spec(mesh, w.logical_axes, w.shape) for w in leaves]
    over = ("expert",) if on_local_tokens and region.sequence_parallel else ()

    def on_shard(shards: list[Array], x: Array, tokens: Any) -> tuple[Array, Any]:
        whole = [
            w.replace(_gathered(a, spec, a.dtype if w.exact else dtype, over))
            for w, a, spec in zip(leaves, shards, specs)
        ]
        y, sums = f(jax.tree.unflatten(tree, whole), x, tokens, region)
        return y, jax.tree.map(lambda a: jax.lax.psum(a, BATCH_AXES), sums)

    out = PartitionSpec(BATCH_AXES, None, "expert") if shard_last else between
    specs_in = (specs, ROWS if ids else between, ROWS)
    sharded = jax.shard_map(on_shard, in_specs=specs_in, out_specs=(out, EVERYWHERE))
    return sharded([w[...] for w in leaves], x, tokens)


def _gathered(w: Array, spec: PartitionSpec, dtype: Any, over: tuple[str, ...]) -> Array:
    """A weight all-gathered over `fsdp` in `dtype`.

    Varying over the other batch axes (and `over`) before: the gradient is then reduce-scattered
    over `fsdp`, in the weight's own dtype, before it crosses them.
    """
    if "fsdp" not in spec:
        return jax.lax.pcast(w, (*BATCH_AXES, *over), to="varying")
    w = jax.lax.pcast(w, ("replica", "data", *over), to="varying")
    return _gather_weight(w, spec.index("fsdp"), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_weight(w: Array, axis: int, dtype: Any) -> Array:
    return jax.lax.all_gather(w.astype(dtype), "fsdp", axis=axis, tiled=True)


def _scatter_gradient(axis: int, dtype: Any, _: None, d: Array) -> tuple[Array]:
    d = d.astype(jnp.float32)
    return (jax.lax.psum_scatter(d, "fsdp", scatter_dimension=axis, tiled=True),)


_gather_weight.defvjp(lambda *args: (_gather_weight(*args), None), _scatter_gradient)


@jax.custom_vjp
def _gather_tokens(x_BlD: Array) -> tuple[Array, Array]:
    """Sequence parallel `Region.gather_inputs`: one all-gather; back, one reduce-scatter."""
    shared_BLD = jax.lax.all_gather(x_BlD, "expert", axis=1, tiled=True, to="invarying")
    return shared_BLD, jax.lax.pcast(shared_BLD, "expert", to="varying")


def _scatter_tokens(_: None, d: tuple[Array, Array]) -> tuple[Array]:
    d_shared_BLD, d_own_BLD = d
    region = Region(jax.lax.axis_size("expert"), sequence_parallel=True)
    return (region.local_tokens(d_shared_BLD) + region.reduce_outputs(d_own_BLD),)


_gather_tokens.defvjp(lambda x: (_gather_tokens(x), None), _scatter_tokens)
