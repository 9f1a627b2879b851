"""What the efficient attentions of encoders share: the projections of the dense block, and another way to mix the heads' values.

None of them can be causal here. A row's padding comes last and changes nothing: where the authors cut the padded length in
pieces, the row's own number of tokens is cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import Region
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import Tokens, valid_tokens


class EncoderAttention(Attention):
    """A subclass says in `mix` how queries, keys and values become the heads' values; heads lie on `expert`."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c.d_model, c.n_heads, n_kv_heads=c.kv_heads, rngs=rngs, **options(c))

    def mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, x_BLD: jax.Array, valid_BL: jax.Array
    ) -> jax.Array:
        """[B,L,h,Dh], what the heads held here give, from q, k, v [B,L,h,Dh], the block's input, and which tokens are no padding."""
        raise NotImplementedError

    def _mix(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        x_BLD: jax.Array,
        tokens: Tokens,
        region: Region,
    ) -> jax.Array:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        return checkpoint_name(
            self.mix(q, k, v, x_BLD, valid_tokens(tokens.segments_BL, q)).astype(q.dtype), "heads"
        )


def shares(scores: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """float32 softmax over the last axis, of what is allowed (bool, broadcast); where nothing is, all alike."""
    scores = scores.astype(jnp.float32)
    return jax.nn.softmax(scores if allowed is None else jnp.where(allowed, scores, -1e30))


def exactly(subscripts: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` of float32 values at full precision, also where accelerators round products by default."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def products(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of values in the compute dtype, added up in float32."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
