"""What all blocks share: the legend of letters, norms, activations, tokens and the base class.

The name of an array ends with its axes, as in `x_BLD`. A letter means the same in every module:

    B  rows of the batch               L  tokens of a row
    M  patches of a row                P  tokens of a patch; L = M·P
    D  model width                     F  hidden width of the MLP
    N  experts of a block              K  experts that a patch chooses
    C  slots of an expert for one row  S  tokens in slots, C·P; in dense attention those of a row
    R  rows in an expert's buffer: B, or fewer under `sequence_capacity_factor`
    H  heads                           G  key/value heads
    Q  query heads of a key/value head, H/G       A  key/value heads of all rows, B·G
    k  width of a query or key, Dh     e  width of a value, Dh
    V  vocabulary entries              T  tokens of all rows, B·L
    J  rank, landmarks or features of a low-rank attention; MLA's latent width
    U  hash rounds (Reformer)          I  inputs of an example (classifier)
    X, Y  any other axis

Other lower-case letters are a part of the capital: n, f, h, g, v of one device or expert, l tokens
of a row on one device, t tokens of a tile or chunk, d the width of a piece of the vocabulary.
"""

import math
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.config.schema import GATED_ACTIVATIONS, ModelConfig
from uoe_jax.distributed.manual import WHOLE, Region, run
from uoe_jax.layers.weights import ones, weight, weight_if, zeros
from uoe_jax.moe.routing import RoutingStats

# Checkpoint names that the remat policy "slots" saves (`models.decoder.REMAT`): narrow activations,
# from which gathered slots, attention scores and activated hidden values are recomputed.
SAVED_NAMES = ("selection", "qkv", "heads", "hidden", "block_out")


def linear(x: Array, w: Array, axes: int = 1) -> Array:
    """Contracts the last `axes` axes of x with the first of w: [...,X] and [X,Y] to [...,Y]."""
    # As a product of two matrices: with more axes XLA transposes their gradient on CPUs, slower
    # than an MLP's matmuls (docs/appendix).
    lead, rows = x.shape[: x.ndim - axes], math.prod(w.shape[:axes])
    return (x.reshape(-1, rows) @ w.reshape(rows, -1)).reshape(*lead, *w.shape[axes:])


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, self.eps = c.d_model, c.norm_eps
        self.scale = weight(rngs, (d,), (None,), ones, exact=True)
        self.bias = weight_if(c.norm == "layernorm", rngs, (d,), (None,), zeros, exact=True)

    def __call__(self, x: Array) -> Array:
        if self.bias is None:
            return rms_norm(x, self.scale[...], self.eps).astype(x.dtype)
        return layer_norm(x, self.scale[...], self.bias[...], self.eps).astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """float32 x / rms(x) * scale over the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y * along_last(scale, y)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """float32 LayerNorm over the last axis; scale and bias have the last axes of x."""
    y = x.astype(jnp.float32)
    y = rms_norm(y - y.mean(-1, keepdims=True), scale, eps)
    return y + along_last(bias, y)


def along_last(v: Array, like: Array) -> Array:
    """v with leading axes of size 1, to broadcast over the last axes of `like`."""
    return v.reshape((1,) * (like.ndim - v.ndim) + v.shape)


def add_bias(y: Array, bias: nnx.Param | Array | None) -> Array:
    """y plus a bias that has the last axes of y, or as many axes with some of size 1; None: y."""
    # Added in float32 and then rounded, as its gradient sums over all tokens: a running sum in 16
    # bits stops growing once it is a few hundred times a term.
    return y if bias is None else (y.astype(jnp.float32) + along_last(bias[...], y)).astype(y.dtype)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Exact GELU, x·Φ(x); the derivative of erf fails in a manual region on jax 0.12.0."""
    return jax.nn.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    cdf = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    pdf = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return gelu(x), t * (cdf + x * pdf)


GATED: dict[str, Callable[[Array], Array]] = {"swiglu": jax.nn.silu, "geglu": gelu}
assert tuple(GATED) == GATED_ACTIVATIONS
PLAIN: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(name: str, up: Array, gate: Array | None) -> Array:
    """The MLP's hidden values: act(up), or act(gate) * up for the gated kinds."""
    return PLAIN[name](up) if gate is None else GATED[name](gate) * up


class Tokens(NamedTuple):
    """What a block knows of its tokens beside their activations."""

    segments_BL: Array | None  # int32 documents, 0 for padding; None: one document, no padding
    positions_BL: Array  # int32, counted inside the document
    rotary: tuple[Array, Array] | None = None  # (cos, sin), each float32 [B,L,Dh/2]
    keys_B: Array | None = None  # in training, a key per row for dropout and router noise

    def folded(self, i: int | Array) -> "Tokens":
        """The same tokens with `i` folded into their keys, for the i-th place that draws."""
        return self if self.keys_B is None else self._replace(keys_B=fold(self.keys_B, i))

    def padded(self, to: int) -> "Tokens":
        """The same rows, padded on the right to `to` tokens."""
        b, l = self.positions_BL.shape
        if l == to:
            return self
        segments_BL = jnp.ones((b, l), jnp.int32) if self.segments_BL is None else self.segments_BL
        arrays = self._replace(segments_BL=segments_BL, keys_B=None)
        return jax.tree.map(lambda a: pad_sequence(a, to - l), arrays)._replace(keys_B=self.keys_B)


# What a block gives: y_BLD, statistics where something is routed, what decoding needs of a prompt.
Outputs = tuple[Array, RoutingStats | None, Any]
Step = tuple[Array, Any]  # y_BD for one token of each row, the cache with it


class Block(nnx.Module):
    """An attention or MLP block: dense, routed or a baseline. Subclasses write the shard's forward.

    Called on a mesh of several devices (`jax.set_mesh`), it is one fully manual region.
    """

    dtype: Any  # compute dtype

    def __call__(self, x_BLD: Array, tokens: Tokens | None = None) -> tuple[Array, Any]:
        """(y_BLD, `RoutingStats` where something is routed, else None)."""
        tokens = tokens_like(x_BLD) if tokens is None else tokens
        forward = lambda block, *args: block._forward(*args)[:2]  # noqa: E731
        return run(forward, self, x_BLD, tokens, dtype=self.dtype)

    def _forward(self, x_BLD: Array, tokens: Tokens, region: Region = WHOLE) -> Outputs:
        """The outputs of a shard's own weights."""
        raise NotImplementedError

    def prefill(self, x_BLD: Array, tokens: Tokens, context: int) -> tuple[Array, Any]:
        """(y_BLD of the whole prompt, the block's own cache with room for `context` tokens)."""
        y_BLD, _, state = self._forward(x_BLD, tokens)
        return y_BLD, self._start_cache(state, tokens, context)

    def _start_cache(self, state: Any, tokens: Tokens, context: int) -> Any:
        """The cache after a prompt, of which `state` is the third of the outputs."""
        raise NotImplementedError

    def decode_step(self, x_BD: Array, cache: Any, t_B: Array, rotary: Any) -> Step:
        """(y_BD of token `t_B` of each row, the cache with it); rotary tables are [B,Dh/2]."""
        raise NotImplementedError


def pad_sequence(a: Array, more: int, axis: int = 1) -> Array:
    """[B,L,…] with `more` zeros at the end of every row, or of another axis."""
    widths = [(0, more if i == axis % a.ndim else 0) for i in range(a.ndim)]
    return jnp.pad(a, widths) if more else a


def valid_tokens(segments_BL: Array | None, like: Array) -> Array:
    """bool [B,L], which tokens of `like` [B,L,…] are not padding."""
    return jnp.ones(like.shape[:2], bool) if segments_BL is None else segments_BL > 0


def mask_empty_segments(segments_RS: Array | None, lengths_R: Array | None, s: int) -> Array | None:
    """Segments of rows of s tokens, with the empty places from `lengths_R` on as segment -1."""
    if lengths_R is None:
        return segments_RS
    filled_RS = jnp.arange(s)[None] < lengths_R[:, None]
    return jnp.where(filled_RS, 1 if segments_RS is None else segments_RS, -1)


def valid_mean(x: Array, valid: Array) -> Array:
    """float32 mean of x [...,L,D] over its valid tokens (bool [...,L]), 0 where there are none."""
    total = jnp.where(valid[..., None], x.astype(jnp.float32), 0).sum(axis=-2)
    return total / jnp.maximum(valid.sum(axis=-1, dtype=jnp.float32), 1)[..., None]


def fold(keys_B: Array, i: int | Array) -> Array:
    """`jax.random.fold_in` for each of several keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys_B)


def dropout(x: Array, rate: float, keys_B: Array | None) -> Array:
    """Dropout of x [B,…] at `rate`; each row draws from its own key, None: no dropout."""
    if not rate or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), 0)


def positions_like(ids_BL: Array) -> Array:
    """int32 [B,L], counted from the start of every row of [B,L,…]."""
    return jnp.broadcast_to(jnp.arange(ids_BL.shape[1], dtype=jnp.int32), ids_BL.shape[:2])


def tokens_like(x_BLD: Array) -> Tokens:
    """One unpadded document per row."""
    return Tokens(None, positions_like(x_BLD))


def rotary_tables(
    positions_BL: Array, head_dim: int, theta: float, stretch: Sequence[float] | None = None
) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, float32 [...,Dh/2] for positions [...].

    stretch: (factor, low, high, length of training), as in Llama 3.1: a frequency is divided by
    `factor` if it turns fewer than `low` times in `length`, kept if more than `high` times.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if stretch:
        factor, low, high, length = stretch
        turns = length * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    positions = positions_BL[..., None].astype(jnp.float32)
    angle = along_last(frequency, positions) * positions
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, tables: tuple[Array, Array] | None) -> Array:
    """Applies rotary tables [...,Dh/2] to x [...,heads,Dh]: first half with second, as in Llama."""
    if tables is None:
        return x
    cos, sin = (t[..., None, :] for t in tables)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
