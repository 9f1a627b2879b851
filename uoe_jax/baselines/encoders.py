"""Efficient attentions of encoders: dense attention's projections, another way to mix the values.

None can be causal here. Padding comes last and changes nothing: where the authors cut the padded
length in pieces, the row's own number of tokens is cut.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.manual import Region
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import Tokens, layer_norm, linear, pad_sequence, rotate, valid_tokens
from uoe_jax.layers.weights import ones, scaled_normal, weight, weight_if, zeros

SMALL = 1e-4  # added to every feature of Performer, as the authors do
ITSELF = -1e5  # Reformer's score of a token with itself: less than any other, more than none


class EncoderAttention(Attention):
    """A subclass writes `mix`, how queries, keys and values become the heads' values."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c.d_model, c.n_heads, rngs=rngs, **options(c))

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        """[B,L,h,k] from q, k, v [B,L,h,k], the block's input, and which tokens are not padding."""
        raise NotImplementedError

    def _mix(self, q: Array, k: Array, v: Array, x_BLD: Array, tokens: Tokens, _: Region) -> Array:
        k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
        mixed = self.mix(q, k, v, x_BLD, valid_tokens(tokens.segments_BL, q))
        return checkpoint_name(mixed.astype(q.dtype), "heads")


def softmax_over(scores: Array, allowed: Array | None = None) -> Array:
    """float32 softmax over the last axis, of what is allowed; uniform where nothing is."""
    scores = scores.astype(jnp.float32)
    return jax.nn.softmax(scores if allowed is None else jnp.where(allowed, scores, -1e30))


def exact_einsum(subscripts: str, *operands: Array) -> Array:
    """`jnp.einsum` of float32 values at full precision on every device."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def einsum(subscripts: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` in the dtype of a, summed in float32."""
    return jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


class Linformer(EncoderAttention):
    """model.attention='linformer': a row's keys and values are projected from L to J.

    Wang et al. 2020, arXiv 2006.04768. K̄ = EᵀK and V̄ = FᵀV with E, F [L,J] that all heads share,
    and softmax attention over these J. Padding is zero in both sums. E and F belong to positions,
    so the context length is part of the model.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        shape, init = (c.block_length, c.linformer.rank), scaled_normal(c.block_length)
        self.w_keys = weight(rngs, shape, (None, None), init)
        self.w_values = weight(rngs, shape, (None, None), init)

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        valid, length = valid_BL[..., None, None].astype(k.dtype), q.shape[1]
        few_k, few_v = (
            jnp.einsum("blhk,lj->bjhk", a * valid, w[...][:length].astype(a.dtype))
            for a, w in ((k, self.w_keys), (v, self.w_values))
        )
        weights_BhLJ = softmax_over(einsum("blhk,bjhk->bhlj", q, few_k) * q.shape[-1] ** -0.5)
        return einsum("bjhk,bhlj->blhk", few_v, weights_BhLJ)


class Nystromformer(EncoderAttention):
    """model.attention='nystromformer': attention through J landmarks, means of tokens.

    Xiong et al. 2021, arXiv 2102.03902. softmax(Q·K̃ᵀ) · pinv(softmax(Q̃·K̃ᵀ)) · softmax(Q̃·Kᵀ)·V,
    the pseudo-inverse by iterated products, plus a depthwise convolution of the values over the
    tokens. Landmark j is the mean of the tokens ⌊j·n/J⌋ to ⌊(j+1)·n/J⌋ of a row's n tokens. The
    first guess of the inverse is of every head and row by itself (the authors' default takes a
    maximum over the batch).
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        n = c.nystromformer
        self.landmarks, self.iterations = n.landmarks, n.iterations
        shape, init = (c.n_heads, n.kernel), scaled_normal(max(n.kernel, 1))
        self.w_conv = weight_if(n.kernel, rngs, shape, ("heads", None), init)

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        scale = q.shape[-1] ** -0.5  # on the scores, which are float32
        means_BJL, full_BJ = landmark_means(valid_BL, self.landmarks)
        few_q, few_k = (einsum("blhk,bjl->bjhk", a, means_BJL).astype(a.dtype) for a in (q, k))
        full, valid = full_BJ[:, None, None], valid_BL[:, None, None]
        to_few_BhLJ = softmax_over(scale * einsum("blhk,bjhk->bhlj", q, few_k), full)
        among_BhJJ = softmax_over(scale * einsum("bjhk,bshk->bhjs", few_q, few_k), full)
        # Empty landmarks: ones on the diagonal, which leave the inverse of the others as it is.
        one = jnp.eye(self.landmarks)[None, None]
        among_BhJJ = jnp.where(full_BJ[:, None, :, None], among_BhJJ, one)
        to_all_BhJL = softmax_over(scale * einsum("bjhk,blhk->bhjl", few_q, k), valid)
        few_BhJk = einsum("blhk,bhjl->bhjk", v, to_all_BhJL)
        inverse_BhJJ = pseudo_inverse(among_BhJJ, self.iterations)
        few_BhJk = exact_einsum("bhjs,bhsk->bhjk", inverse_BhJJ, few_BhJk)
        y_BLhk = exact_einsum("bhlj,bhjk->blhk", to_few_BhLJ, few_BhJk)
        if self.w_conv is None:
            return y_BLhk
        b, length, h, dh = v.shape
        v = v * valid_BL[..., None, None].astype(v.dtype)
        rows = v.transpose(0, 3, 1, 2).reshape(b * dh, length, h)
        kernel = self.w_conv[...].T[:, None].astype(v.dtype)  # [width,1,h]
        form: Any = dict(dimension_numbers=("NWC", "WIO", "NWC"))
        form |= dict(preferred_element_type=jnp.float32)
        y = jax.lax.conv_general_dilated(rows, kernel, (1,), "SAME", feature_group_count=h, **form)
        return y_BLhk + y.reshape(b, dh, length, h).transpose(0, 2, 3, 1)


def landmark_means(valid_BL: Array, n: int) -> tuple[Array, Array]:
    """(float32 [B,J,L] share of a token in each of n landmarks, bool [B,J] which have tokens)."""
    count_B = valid_BL.sum(axis=1, dtype=jnp.int32)
    edges = jnp.arange(n + 1, dtype=jnp.int32)[None] * count_B[:, None] // n
    place_11L = jnp.arange(valid_BL.shape[1], dtype=jnp.int32)[None, None]
    member_BJL = (place_11L >= edges[:, :-1, None]) & (place_11L < edges[:, 1:, None])
    size_BJ = member_BJL.sum(axis=-1)
    at_least_1 = jnp.maximum(size_BJ, 1).astype(jnp.float32)[..., None]
    return member_BJL.astype(jnp.float32) / at_least_1, size_BJ > 0


def pseudo_inverse(a: Array, iterations: int) -> Array:
    """Of matrices [...,J,J] whose rows sum to 1, by the authors' third-order iteration, float32."""
    one = jnp.eye(a.shape[-1])[(None,) * (a.ndim - 2)]
    z = a.swapaxes(-1, -2) / a.sum(axis=-2).max(axis=-1)[..., None, None]
    times = functools.partial(exact_einsum, "...rs,...st->...rt")
    for _ in range(iterations):
        az = times(a, z)
        z = times(0.25 * z, 13 * one - times(az, 15 * one - times(az, 7 * one - az)))
    return z


class Performer(EncoderAttention):
    """model.attention='performer': positive orthogonal random features, FAVOR+.

    Choromanski et al. 2020, arXiv 2009.14794. exp(q·k) is the mean of φ(q)·φ(k) over J random
    directions w, with φ(x) = exp(w·x − ‖x‖²/2); keys and values are then summed once for all
    queries. Directions are orthogonal in blocks of Dh, with the length of normal vectors, drawn
    once with the weights and shared by a layer's heads (the authors can redraw them in training).
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        shape, drawn = (c.performer.features, c.head_dim), dict(exact=True, trained=False)
        self.directions = weight(rngs, shape, (None, None), orthogonal_normal, **drawn)

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        valid = valid_BL[..., None, None]
        w_Jk = jax.lax.stop_gradient(self.directions[...])
        q, k = (a.astype(jnp.float32) * a.shape[-1] ** -0.25 for a in (q, k))
        along_q, along_k = (exact_einsum("blhk,jk->blhj", a, w_Jk) for a in (q, k))
        half_q, half_k = (jnp.square(a).sum(axis=-1, keepdims=True) / 2 for a in (q, k))
        most_q = along_q.max(axis=-1, keepdims=True)
        most_k = jnp.where(valid, along_k, -1e30).max(axis=(1, 3), keepdims=True)
        most_q, most_k = jax.lax.stop_gradient((most_q, most_k))
        phi_q = jnp.exp(along_q - half_q - most_q) + SMALL
        phi_k = jnp.exp(jnp.where(valid, along_k - half_k - most_k, 0)) + SMALL
        phi_k = jnp.where(valid, phi_k, 0)
        summed = exact_einsum("blhj,blhk->bhjk", phi_k, v.astype(jnp.float32))
        total = exact_einsum("blhj,bhj->blh", phi_q, phi_k.sum(axis=1))
        # A row of padding has total 0; it is divided by 1, so that its gradient stays finite.
        total = jnp.where(total > 0, total, 1)[..., None]
        return exact_einsum("blhj,bhjk->blhk", phi_q, summed) / total


def orthogonal_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """[J,Dh]: rows orthogonal in blocks of Dh, each with the length of a normal vector."""
    j, dh = shape
    directions, lengths = jax.random.split(key)
    blocks = jax.random.normal(directions, (-(-j // dh), dh, dh), dtype)
    q, triangle = jnp.linalg.qr(blocks)
    # The signs of Gram-Schmidt: those of the factorisation favour a side and bias the mean.
    q = q * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[:, None]
    rows = q.swapaxes(-1, -2).reshape(-1, dh)[:j]
    normal = jax.random.normal(lengths, (j, dh), dtype)
    return rows * jnp.linalg.norm(normal, axis=-1, keepdims=True)


class LongShort(EncoderAttention):
    """model.attention='long_short': Transformer-LS, a window and dynamic projections.

    Zhu et al. 2021, arXiv 2107.02192. A token attends, in one softmax, to the tokens of its own
    segment of w and of half a segment on either side, and to J dynamic projections of the whole
    row: P = softmax over the tokens of X·W_p, by head, K̄ = PᵀK, V̄ = PᵀV (equation 3). Both kinds
    have a LayerNorm of their own (DualLN), here of every head by itself (the authors': of all heads
    as one vector); K̄ and V̄ are of keys and values as projected (the authors' code norms first).
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        d, h, dh = c.d_model, c.n_heads, c.head_dim
        self.window, self.eps = c.long_short.window, c.norm_eps
        shape, axes = (d, h, c.long_short.rank), ("embed", "heads", None)
        self.w_p = weight(rngs, shape, axes, scaled_normal(d))
        of_head = (h, dh), ("heads", None)
        self.near_scale = weight(rngs, *of_head, ones, exact=True)
        self.far_scale = weight(rngs, *of_head, ones, exact=True)
        self.near_bias = weight(rngs, *of_head, zeros, exact=True)
        self.far_bias = weight(rngs, *of_head, zeros, exact=True)

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        b, length, h, dh = q.shape
        w, more = self.window, -length % self.window
        scores_BLhJ = linear(x_BLD, self.w_p[...].astype(x_BLD.dtype))
        p_BhJL = softmax_over(scores_BLhJ.transpose(0, 2, 3, 1), valid_BL[:, None, None])
        far = (einsum("blhk,bhjl->bjhk", a, p_BhJL) for a in (k, v))
        far_norm = self.far_scale[...], self.far_bias[...], self.eps
        far_k, far_v = (layer_norm(a, *far_norm).astype(q.dtype) for a in far)
        near_norm = self.near_scale[...], self.near_bias[...], self.eps
        near = (layer_norm(a, *near_norm).astype(q.dtype) for a in (k, v))
        near_k, near_v, valid = (around(pad_sequence(a, more), w) for a in (*near, valid_BL))
        # From here on by segment (s) of w queries (q), which see 2·w near keys (t).
        q = pad_sequence(q, more).reshape(b, -1, w, h, dh)
        near_scores = einsum("bsqhk,bsthk->bshqt", q, near_k)
        near_scores = jnp.where(valid[:, :, None, None], near_scores, -1e30)
        far_scores = einsum("bsqhk,bjhk->bshqj", q, far_k)
        scores = jnp.concatenate([near_scores, far_scores], axis=-1) * dh**-0.5
        near_weights, far_weights = jnp.split(softmax_over(scores), [2 * w], axis=-1)
        y = einsum("bsthk,bshqt->bsqhk", near_v, near_weights)
        y = y + einsum("bjhk,bshqj->bsqhk", far_v, far_weights)
        return y.reshape(b, -1, h, dh)[:, :length]


def around(a_BL: Array, window: int) -> Array:
    """What each segment of w tokens of [B,L,…] sees: [B,L/w,2·w,…], zeros beyond the ends."""
    half, rest = window // 2, ((0, 0),) * (a_BL.ndim - 2)
    padded = jnp.pad(a_BL, ((0, 0), (half, half), *rest))
    halves = padded.reshape(a_BL.shape[0], -1, half, *a_BL.shape[2:])
    n = a_BL.shape[1] // window
    return jnp.concatenate([halves[:, i : i + 2 * n : 2] for i in range(4)], axis=2)


class Reformer(EncoderAttention):
    """model.attention='reformer': attention among tokens in one hash bucket (LSH).

    Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451. Queries and keys are one projection, keys of
    length 1. In every round a token's bucket is the nearest of n_buckets random directions; tokens
    are sorted by bucket, cut in chunks, and attend to their own chunk and the one before it, the
    first of a round to the last of the round before. A token attends to itself only where there is
    nothing else. Rounds are weighed by their softmax totals, and a pair that meets in several
    rounds counts in each (the paper divides by their number; the authors' code does not). Rotary
    positions turn what is compared and not what is hashed. Directions are drawn once with the
    weights (the authors': at every step). A full row has two buckets a chunk.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(c, rngs=rngs)
        self.w_k = self.b_k = None
        self.chunk = c.reformer.chunk
        half = -(-c.block_length // self.chunk)
        shape = (c.n_heads, c.head_dim, c.reformer.n_hashes, half)
        axes, init = ("heads", None, None, None), nnx.initializers.normal(1.0)
        self.rotations = weight(rngs, shape, axes, init, exact=True, trained=False)

    def _project(self, x: Array, rotary: Any) -> tuple[Array, Array, Array]:
        qk, v = self._heads(x, self.w_q, self.b_q), self._heads(x, self.w_v, self.b_v)
        # What is hashed is not rotated: equal tokens fall into one bucket wherever they are.
        return rotate(qk, rotary), qk, v

    def mix(self, q: Array, k: Array, v: Array, x_BLD: Array, valid_BL: Array) -> Array:
        b, length, h, dh = q.shape  # k: the same as q, as it is hashed
        more = -length % self.chunk
        q, hashed, v, valid_BL = (pad_sequence(a, more) for a in (q, k, v, valid_BL))
        q_BhLk, hashed_BhLk, v_BhLk = (a.transpose(0, 2, 1, 3) for a in (q, hashed, v))
        order_BhUL, place_BhUL = self._sorted(hashed_BhLk, valid_BL)
        u, l = order_BhUL.shape[2:]
        chunks = (b, h, u, -1, self.chunk)

        def at(a_BhLX: Array) -> Array:
            """[B,h,L,X] in sorted order, cut in chunks: [B,h,U,chunks,chunk,X]."""
            rows = jnp.take_along_axis(a_BhLX, order_BhUL.reshape(b, h, u * l, 1), axis=2)
            return rows.reshape(*chunks, a_BhLX.shape[-1])

        own = order_BhUL.reshape(chunks)
        valid = jnp.take_along_axis(valid_BL[:, None, None], order_BhUL, axis=-1).reshape(own.shape)
        count_B = valid_BL.sum(axis=1, dtype=jnp.int32)
        last_B = jnp.maximum(-(-count_B // self.chunk) - 1, 0)
        keys, values, places = (
            jnp.concatenate([before(a, last_B), a], axis=4)
            for a in (at(unit(q_BhLk)), at(v_BhLk), own)
        )
        # A row of one chunk has none before it: what `before` gives there is the chunk itself.
        first = before(valid, last_B) & (last_B > 0)[:, None, None, None, None]
        valid = jnp.concatenate([first, valid], axis=4)
        scores = einsum("bhucqk,bhucsk->bhucqs", at(q_BhLk), keys)
        scores = jnp.where(own[..., :, None] == places[..., None, :], ITSELF, scores)
        scores = jnp.where(valid[..., None, :], scores, -1e30)
        total = jax.nn.logsumexp(scores, axis=-1)
        mixed = einsum("bhucsk,bhucqs->bhucqk", values, jnp.exp(scores - total[..., None]))
        # The rounds' values in the tokens' order, weighed by a softmax of their totals.
        total_BhUL = jnp.take_along_axis(total.reshape(b, h, u, l), place_BhUL, axis=-1)
        mixed = jnp.take_along_axis(mixed.reshape(b, h, u, l, dh), place_BhUL[..., None], axis=3)
        y_BhLk = (mixed * jax.nn.softmax(total_BhUL, axis=2)[..., None]).sum(axis=2)
        return y_BhLk.transpose(0, 2, 1, 3)[:, :length]

    def _sorted(self, hashed_BhLk: Array, valid_BL: Array) -> tuple[Array, Array]:
        """(int32 [B,h,U,L] every round's tokens by bucket, padding last; the inverse)."""
        directions = jax.lax.stop_gradient(self.rotations[...])
        hashed_BhLk = jax.lax.stop_gradient(hashed_BhLk).astype(jnp.float32)
        turned = exact_einsum("bhlk,hkun->bhuln", hashed_BhLk, directions)
        bucket_BhUL = jnp.concatenate([turned, -turned], axis=-1).argmax(axis=-1)
        bucket_BhUL = jnp.where(valid_BL[:, None, None], bucket_BhUL, 2 * directions.shape[-1])
        order_BhUL = jnp.argsort(bucket_BhUL, axis=-1, stable=True).astype(jnp.int32)
        return order_BhUL, jnp.argsort(order_BhUL, axis=-1).astype(jnp.int32)


def unit(x: Array) -> Array:
    """x [...,k] with length 1."""
    y, width = x.astype(jnp.float32), x.shape[-1]
    y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + 1e-6) * width**-0.5
    return y.astype(x.dtype)


def before(a: Array, last_B: Array) -> Array:
    """The chunk before each of [B,h,U,chunks,…]; a round's first follows the last of another."""
    index = last_B.reshape(-1, *(1,) * (a.ndim - 1))
    index = jnp.broadcast_to(index, (*a.shape[:3], 1, *a.shape[4:]))
    wrapped = jnp.roll(jnp.take_along_axis(a, index, axis=3), 1, axis=2)
    return jnp.concatenate([wrapped, a[:, :, :, :-1]], axis=3)
