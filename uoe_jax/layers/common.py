"""What every block uses: the declaration of a weight, norms, activations, and the description of a batch of tokens.

Letters: B batch, L length, M patches, P tokens per patch, D model width, N experts, C slots, S = C·P,
F hidden width (f = F/N per expert), H heads (h = H/N), G key/value heads (g = G/N), Dh head width.
"""

from __future__ import annotations

import math
from typing import Any, Callable, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.config.schema import GATED_ACTIVATIONS
from uoe_jax.moe.routing import RoutingStats

# Names of the activations the default remat policy keeps for the backward pass (`model.REMAT`): the narrow ones.
# Gathered slots, attention scores and activations are made again from these.
KEPT = ("selection", "qkv", "heads", "hidden", "block_out")

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
zeros = nnx.initializers.zeros
ones = nnx.initializers.ones


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    exact: bool = False,
    trained: bool = True,
) -> nnx.Param:
    """The one declaration of a weight, float32: shape, logical axes (from which shardings follow) and initialiser.

    exact: used in float32 whatever the compute dtype. trained: False for what is drawn once; stop its gradient where it is
    used. Weight decay applies to matrices: not to vectors, nor to the scales and biases of several experts or heads.
    """
    assert len(shape) == len(axes), (shape, axes)
    decay = trained and init not in (zeros, ones) and len(shape) > 1
    return nnx.Param(
        init(rngs.params(), shape, jnp.float32), logical_axes=axes, decay=decay, exact=exact
    )


def scaled_normal(fan_in: int, scale: float = 1.0) -> Initializer:
    """Normal with standard deviation scale / sqrt(fan_in)."""
    return nnx.initializers.normal(scale / fan_in**0.5)


def linear(x: jax.Array, w: jax.Array, axes: int = 1) -> jax.Array:
    """Tokens times a matrix: the last `axes` axes of x with the first of w, [...,X] and [X,Y] to [...,Y]; both in their dtype.

    As a product of two matrices, whatever axes tokens and heads have: of more axes XLA makes a transposed copy of their
    gradient on CPUs, which took more time than the products of an MLP (docs/performance.md).
    """
    tokens, rows = x.shape[: x.ndim - axes], math.prod(w.shape[:axes])
    return (x.reshape(-1, rows) @ w.reshape(rows, -1)).reshape(*tokens, *w.shape[axes:])


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32."""

    def __init__(
        self, d_model: int, *, kind: str = "rmsnorm", eps: float = 1e-6, rngs: nnx.Rngs
    ) -> None:
        self.kind, self.eps = kind, eps
        self.scale = weight(rngs, (d_model,), (None,), ones, exact=True)
        self.bias = (
            weight(rngs, (d_model,), (None,), zeros, exact=True) if kind == "layernorm" else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = rms_norm(y, self.scale[...], self.eps)
        if self.bias is not None:
            y = y + along_last(self.bias[...], y)
        return y.astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """float32 x / rms(x) * scale over the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y * along_last(scale, y)


def along_last(v: jax.Array, like: jax.Array) -> jax.Array:
    """v with leading axes of size 1, to broadcast over the last axes of `like` (rank promotion is never implicit)."""
    return v.reshape((1,) * (like.ndim - v.ndim) + v.shape)


def add_bias(y: jax.Array, bias: nnx.Param | jax.Array | None) -> jax.Array:
    """y [...,X] with a bias along its last axes, or of as many axes; None: none.

    Added in float32 and then rounded: the gradient of a bias is a sum over all tokens, and one that is rounded to 16 bits
    on the way stands still once it is a few hundred times a term.
    """
    return y if bias is None else (y.astype(jnp.float32) + along_last(bias[...], y)).astype(y.dtype)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x·Φ(x). Its derivative Φ(x) + x·φ(x) is written out: that of erf fails in a manual region on jax 0.12.0."""
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    pdf = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return gelu(x), t * (cdf + x * pdf)


GATED: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": jax.nn.silu, "geglu": gelu}
assert tuple(GATED) == GATED_ACTIVATIONS
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(name: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The MLP's hidden values: act(up), or act(gate) * up for the gated kinds."""
    return PLAIN[name](up) if gate is None else GATED[name](gate) * up


class Part(Protocol):
    """What a block is made of: an attention or an MLP, dense, routed or compared; called by position but for `tokens`."""

    def __call__(
        self, x_BLD: jax.Array, tokens: Tokens | None = None
    ) -> tuple[jax.Array, RoutingStats | None]:
        """(y_BLD, statistics where something is routed)."""

    def prefill(self, x_BLD: jax.Array, tokens: Tokens, context: int) -> tuple[jax.Array, Any]:
        """(y_BLD of the whole prompt, a cache of its own kind with room for `context` tokens)."""

    def decode_step(
        self, x_BD: jax.Array, cache: Any, t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, Any]:
        """(y_BD of token `t_B` of each sequence, the cache with it)."""


class Tokens(NamedTuple):
    """What a block must know of its tokens beside their vectors.

    Attributes:
      segments_BL: int32, the document of a token, 0 for padding; None means one document without padding.
      positions_BL: int32, counted inside the document.
      rotary: (cos, sin), each float32 [B,L,Dh/2], or None without rotary positions.
      keys_B: in training, a random key for each row, from which dropout and router noise draw; None: evaluation.
    """

    segments_BL: jax.Array | None
    positions_BL: jax.Array
    rotary: tuple[jax.Array, jax.Array] | None = None
    keys_B: jax.Array | None = None

    def folded(self, i: int | jax.Array) -> Tokens:
        """The same tokens for the i-th of several places that draw, so that each draws its own."""
        return self if self.keys_B is None else self._replace(keys_B=fold(self.keys_B, i))

    def padded(self, to: int) -> Tokens:
        """The same rows with padding behind them, `to` tokens long."""
        b, l = self.positions_BL.shape
        if l == to:
            return self
        segments_BL = jnp.ones((b, l), jnp.int32) if self.segments_BL is None else self.segments_BL
        by_token = self._replace(segments_BL=segments_BL, keys_B=None)
        return jax.tree.map(lambda a: pad_sequence(a, to - l), by_token)._replace(
            keys_B=self.keys_B
        )


def pad_sequence(a_BL: jax.Array, more: int) -> jax.Array:
    """[B,L,…] with `more` zeros behind every row."""
    return jnp.pad(a_BL, ((0, 0), (0, more), *((0, 0),) * (a_BL.ndim - 2))) if more else a_BL


def valid_tokens(segments_BL: jax.Array | None, like: jax.Array) -> jax.Array:
    """bool [B,L], which tokens of `like` [B,L,…] are no padding."""
    return jnp.ones(like.shape[:2], bool) if segments_BL is None else segments_BL > 0


def mask_empty_segments(
    segments_BS: jax.Array | None, lengths_B: jax.Array | None, s: int
) -> jax.Array | None:
    """Segments of rows of s places in which those from each row's length on, empty ones, are a segment of their own."""
    if lengths_B is None:
        return segments_BS
    return jnp.where(
        jnp.arange(s)[None] < lengths_B[:, None], 1 if segments_BS is None else segments_BS, -1
    )


def valid_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
    """float32 mean of x [...,L,D] over its valid tokens (bool [...,L]), 0 where there are none."""
    total = jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum(axis=-2)
    return total / jnp.maximum(valid.sum(axis=-1, dtype=jnp.float32), 1)[..., None]


def fold(keys_B: jax.Array, i: int | jax.Array) -> jax.Array:
    """`jax.random.fold_in` for each of several keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """x [B,…] with a share `rate` of its values zeroed and the others scaled to keep the mean; a row draws from its key."""
    if not rate or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), 0)


def tokens_like(x_BLD: jax.Array) -> Tokens:
    """One unpadded document per row."""
    b, l = x_BLD.shape[:2]
    return Tokens(None, jnp.broadcast_to(jnp.arange(l, dtype=jnp.int32), (b, l)))


def rotary_tables(
    positions_BL: jax.Array,
    head_dim: int,
    theta: float,
    stretch: tuple[float, float, float, float] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [..., Dh/2] for positions [...]; stretch: see `stretched`."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    frequency = frequency if stretch is None else stretched(frequency, *stretch)
    angle = along_last(frequency, positions_BL[..., None]) * positions_BL[..., None].astype(
        jnp.float32
    )
    return jnp.cos(angle), jnp.sin(angle)


def stretched(
    frequency: jax.Array, factor: float, low: float, high: float, length: float
) -> jax.Array:
    """Rotary frequencies for contexts longer than the `length` they were trained with, as in Llama 3.1: divided by `factor`
    where they turn fewer than `low` times in it, kept where more than `high` times, and in between blended."""
    turns = length * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Applies rotary tables [..., Dh/2] to x [..., heads, Dh] (first half paired with second half, as in Llama)."""
    if tables is None:
        return x
    cos, sin = (t[..., None, :] for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
