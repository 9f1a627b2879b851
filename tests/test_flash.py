"""Attention in tiles, and losses of a vocabulary in chunks, against references of a few lines; memory that grows with the length."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow

from uoe_jax import RoutingConfig
from uoe_jax.layers import attention, smha, tiles
from uoe_jax.layers import fused as fused_lib
from uoe_jax.layers.attention import attend, group_keys
from uoe_jax.layers.chunked import chunked_nll
from uoe_jax.layers.common import tokens_like
from uoe_jax.layers.fused import fused

B, H, G, DH = 2, 4, 2, 8


def plain(q, k, v, segments, causal):
    """Softmax attention with the whole square of scores."""
    s, rep = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(a, rep, axis=2) for a in (k, v))
    allowed = (
        jnp.ones((1, s, s), bool) if segments is None else segments[:, :, None] == segments[:, None]
    )
    allowed = allowed & jnp.tril(jnp.ones((s, s), bool))[None] if causal else allowed
    scores = jnp.where(
        allowed[:, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, -jnp.inf
    )
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def drawn(s, dv=DH):
    return (
        reference.normal(0, B, s, H, DH),
        reference.normal(1, B, s, G, DH),
        reference.normal(2, B, s, G, dv),
    ), reference.normal(3, B, s, H, dv)


def pulled(f, args, d):
    y, pull = jax.vjp(f, *args)
    return y, pull(d)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s, side", [(24, 24), (48, 16), (50, 16), (17, 16)])
@pytest.mark.parametrize("documents", [slow(1), 3])
def test_value_and_gradients(monkeypatch, s, side, causal, documents):
    monkeypatch.setattr(tiles, "LARGEST", side)
    args, d = drawn(s, dv=6)
    segments = (
        None
        if documents == 1
        else jnp.asarray(np.arange(s)[None] * documents // s + np.array([[0], [1]]), jnp.int32)
    )
    found = jax.jit(lambda *a: pulled(lambda *b: attend(*b, segments, causal), a, d))(*args)
    wanted = pulled(lambda *b: plain(*b, segments, causal), args, d)
    assert reference.error(found, wanted) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_in_16_bits_are_not_rounded_by_their_scale(monkeypatch, causal, dtype):
    """Heads of 32, whose 1/sqrt(Dh) is no power of two, and scores of which a rounded query would move the largest."""
    monkeypatch.setattr(tiles, "LARGEST", 32)
    q, k, v, d = (4 * reference.normal(i, 1, 64, 2, 32).astype(dtype) for i in range(4))
    y, pulled_back = jax.jit(lambda *a: pulled(lambda *b: attend(*b, None, causal), a, d))(q, k, v)
    wanted = pulled(
        lambda *b: plain(*b, None, causal),
        [a.astype(jnp.float32) for a in (q, k, v)],
        d.astype(jnp.float32),
    )
    assert y.dtype == dtype
    limit = 2.5e-3 if dtype == "bfloat16" else 3.5e-4
    assert reference.norm_error(y, wanted[0]) < limit
    for found, sought in zip(pulled_back, wanted[1]):
        assert reference.norm_error(found, sought) < 5 * limit


def test_small_gradients_in_float16_are_not_scaled_below_its_least_number(monkeypatch):
    monkeypatch.setattr(tiles, "LARGEST", 128)
    q, k, v, d = (reference.normal(i, 1, 256, 2, 32).astype("float16") for i in range(4))
    d = d * 2**-12
    found = jax.jit(lambda *a: pulled(lambda *b: attend(*b, None, False), a, d))(q, k, v)[1]
    wanted = pulled(
        lambda *b: plain(*b, None, False),
        [a.astype(jnp.float32) for a in (q, k, v)],
        d.astype(jnp.float32),
    )[1]
    assert reference.norm_error(found, wanted) < 5e-3  # 1.1e-2 with the scale on what is rounded


@pytest.mark.parametrize("how", ["tiles", "fused"])
def test_empty_places_at_the_end_are_not_attended_to(monkeypatch, how):
    monkeypatch.setattr(tiles, "LARGEST", 16)
    s, lengths = 40, jnp.asarray([40, 23])
    (q, k, v), d = drawn(s)
    there = (jnp.arange(s)[None] < lengths[:, None])[..., None, None].astype(jnp.float32)
    f = (
        functools.partial(attend, causal=False, lengths=lengths)
        if how == "tiles"
        else lambda *a: fused(*a, False, lengths, "xla")
    )
    found, wanted = [], []
    for fill in (0.0, 1e3):
        filled = [jnp.where(there > 0, a, fill) for a in (q, k, v)]
        found.append(jax.jit(lambda *a: pulled(lambda *b: f(*b, None) * there, a, d))(*filled))
        segments = jnp.where(there[..., 0, 0] > 0, 1, 2 + jnp.arange(s)[None])
        wanted.append(pulled(lambda *b: plain(*b, segments, False) * there, filled, d))
    for a, b in zip(found, wanted):
        assert reference.error(a[0], b[0]) < 1e-5
    for a, b in zip(found[0][1], found[1][1]):
        assert reference.error(a * there, b * there) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [1, 2])
def test_the_fused_kernel_is_asked_for_the_same(causal, documents):
    """The call that is cuDNN's on NVIDIA, by another implementation of the same function."""
    s = 24
    args, d = drawn(s)
    segments = (
        None
        if documents == 1
        else jnp.asarray(np.arange(s)[None] // 9 + np.zeros((B, 1)), jnp.int32)
    )
    found = jax.jit(lambda *a: pulled(lambda *b: fused(*b, segments, causal, None, "xla"), a, d))(
        *args
    )
    assert reference.error(found, pulled(lambda *b: plain(*b, segments, causal), args, d)) < 1e-5


class Packed:
    """cuDNN's packed form as JAX describes it, by plain attention: documents are given by their first tokens and lengths."""

    class MaskType:
        PADDING, PADDING_CAUSAL = "padding", "causal"

    @staticmethod
    def dot_product_attention(
        q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type
    ):
        assert q_seqlen is kv_seqlen and q_offsets is kv_offsets and scale == q.shape[-1] ** -0.5
        begun = (q_offsets[..., None] <= jnp.arange(q.shape[1])[None, None]) & (
            q_offsets[..., None] >= 0
        )
        jax.debug.callback(
            lambda o, n: Packed.asked.append((o.tolist(), n.tolist())), q_offsets, q_seqlen
        )
        return plain(q, k, v, begun.sum(axis=1), mask_type == "causal")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents, most", [(1, 3), (3, 3), (3, 2)])
def test_documents_are_given_by_offsets_and_lengths(monkeypatch, causal, documents, most):
    """Rows of three documents, one of them with empty places behind, or of one each: masked only where they are more than `most`."""
    monkeypatch.setattr(fused_lib, "_packed_form", lambda grouped: Packed)
    monkeypatch.setattr(fused_lib, "MOST", most)
    masked, Packed.asked = jax.nn.dot_product_attention, []
    s, lengths = 24, jnp.asarray([24, 20 if documents > 1 else 24])
    args, d = drawn(s)
    there = jnp.arange(s)[None] < lengths[:, None]
    rows = (
        [[1] * 9 + [2] * 14 + [3], [1] * 16 + [2] * 4 + [1] * 4]
        if documents > 1
        else [[1] * 24, [2] * 24]
    )
    segments = jnp.asarray(rows, jnp.int32)

    def asked(*a, implementation, **more):
        assert implementation == "cudnn"
        return masked(*a, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", asked)
    d = jnp.where(there[..., None, None], d, 0)
    y, found = jax.jit(
        lambda *a: pulled(lambda *b: fused(*b, segments, causal, lengths, "cudnn"), a, d)
    )(*args)
    wanted_y, wanted = pulled(lambda *b: plain(*b, jnp.where(there, segments, -1), causal), args, d)
    y, wanted_y = (jnp.where(there[..., None, None], a, 0) for a in (y, wanted_y))
    assert reference.error((y, found), (wanted_y, wanted)) < 1e-5
    jax.effects_barrier()
    told = ([[0, 9, 23, -1], [0, 16, 20, -1]], [[9, 14, 1], [16, 4, 4]])
    assert Packed.asked == (
        [told, told] if documents == most else []
    )  # forward, and in the backward pass


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 11, 0), (0, 11, 1), (0, 12, 0)])
def test_key_heads_that_are_shared_are_packed_where_jax_knows_where_they_begin(
    monkeypatch, version
):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(fused_lib, "_on_nvidia", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(fused_lib.importlib, "import_module", lambda name: Packed)
    assert fused_lib._packed_form.__wrapped__(False) is Packed
    assert (fused_lib._packed_form.__wrapped__(True) is Packed) == (version >= (0, 11, 1))


@pytest.mark.slow
def test_nan_in_empty_slots_reaches_nothing(monkeypatch):
    """Not causal, rows of one token and of none: attention that leaves NaN behind a row's length gives finite gradients."""
    whole = smha.attend

    def careless(q, k, v, segments, causal, drop_rate, keys, lengths):
        o = whole(q, k, v, segments, causal, drop_rate, keys, lengths)
        return jnp.where(
            (jnp.arange(o.shape[1])[None] < lengths[:, None])[..., None, None], o, jnp.nan
        )

    routing = RoutingConfig(n_experts=4, k=2, priority="score")
    graphdef, state = nnx.split(smha.SMHA(16, 4, routing, causal=False, rngs=nnx.Rngs(0)))
    x, segments = (
        reference.normal(0, 3, 8, 16),
        jnp.asarray([[1] * 8, [1] + [0] * 7, [0] * 8], jnp.int32),
    )

    def loss(state, x):
        tokens = tokens_like(x)._replace(segments_BL=segments)
        return jnp.square(nnx.merge(graphdef, state)(x, tokens)[0]).sum()

    wanted = jax.grad(loss, argnums=(0, 1))(state, x)
    monkeypatch.setattr(smha, "attend", careless)
    found = jax.grad(loss, argnums=(0, 1))(state, x)
    assert reference.error(found, wanted) < 1e-6 and all(
        np.isfinite(a).all() for a in jax.tree.leaves(found)
    )


def test_runs_of_documents():
    firsts, lengths, most = fused_lib.runs(
        jnp.asarray([[1, 1, 2, 2, 0], [4, 4, 4, 4, 4], [1, 2, 1, 2, 1]], jnp.int32), 3
    )
    assert most == 5
    assert firsts[:2].tolist() == [[0, 2, 4, -1], [0, -1, -1, -1]] and lengths[:2].tolist() == [
        [2, 2, 1],
        [5, -1, -1],
    ]


def test_what_cudnn_is_asked(monkeypatch):
    def fits(dtype="bfloat16", dh=64, dv=64, s=32, drop_rate=0.0):
        q, v = (jax.ShapeDtypeStruct((2, s, 4, width), dtype) for width in (dh, dv))
        return fused_lib.fits_cudnn(q, v, drop_rate)

    assert not fits()  # there is no NVIDIA GPU
    monkeypatch.setattr(fused_lib, "_on_nvidia", lambda: True)
    assert fits() and fits("float16") and fits(dh=128, dv=128)
    assert not any(
        (
            fits("float32"),
            fits(dh=96),
            fits(dh=60, dv=60),
            fits(dh=256, dv=256),
            fits(s=31),
            fits(drop_rate=0.1),
        )
    )
    asked = []
    monkeypatch.setattr(attention, "fused", lambda *a: asked.append(a[3:]) or a[0])
    q = jnp.zeros((2, 32, 4, 64), jnp.bfloat16)
    attend(q, q, q, None, True)
    assert asked == [(None, True, None, "cudnn")]


def test_dropout_is_the_same_forward_and_backward(monkeypatch):
    """With the weights that the forward pass dropped taken from it, the gradients are those of plain attention so dropped."""
    monkeypatch.setattr(tiles, "LARGEST", 16)
    s, rate = 32, 0.4
    (q, k, _), _ = drawn(s)
    v, d = reference.normal(2, B, s, G, s), reference.normal(3, B, s, H, s)
    keys = group_keys(jax.random.split(jax.random.key(0), B), G)
    found = jax.jit(lambda *a: pulled(lambda *b: attend(*b, None, True, rate, keys), a, d))(q, k, v)
    # Values that are the unit vectors show the weights.
    eye = jnp.broadcast_to(jnp.eye(s)[None, :, None], (B, s, G, s))
    kept = attend(q, k, eye, None, True, rate, keys) != 0
    share = int(kept.sum()) / (B * H * s * (s + 1) / 2)
    assert abs(share - 0.6) < 0.05

    def so_dropped(q, k, v):
        weights = plain(q, k, eye, None, True)
        weights = jnp.where(kept, weights / (1 - rate), 0)
        return jnp.einsum("bqhk,bkhd->bqhd", weights, jnp.repeat(v, H // G, axis=2))

    assert reference.error(found, pulled(so_dropped, (q, k, v), d)) < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_length_and_not_with_its_square(causal):
    def held(s):
        shapes = [jax.ShapeDtypeStruct((1, s, 4, 32), jnp.float32)] * 3
        f = jax.jit(jax.grad(lambda *a: attend(*a, None, causal).sum(), argnums=(0, 1, 2)))
        return f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert held(4096) < 1.7 * held(2048) < 3 * held(1024)
    assert held(4096) < 4 * 4096 * 4096 * 4 / 10  # the scores would be 268 MB


@pytest.mark.parametrize(
    "length, side, n",
    [(1, 1, 1), (256, 256, 1), (257, 136, 2), (512, 256, 2), (300, 152, 2), (1000, 256, 4)],
)
def test_tiles(length, side, n):
    assert tiles.tile(length) == side and side * n >= length > side * (n - 1)
    for causal in (True, False):
        pairs = tiles.pairs(length, causal)
        assert len(pairs) == (n * (n + 1) // 2 if causal else n * n)
        assert tiles.computed_scores(length, causal) == len(pairs) * side**2


@pytest.mark.parametrize(
    "n, start, stop", [(40, 0, 40), (40, 3, 29), (16, 0, 16), (10, 0, 10), (40, 7, 7)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_of_a_vocabulary(monkeypatch, n, start, stop, dtype):
    monkeypatch.setattr(tiles, "LEAST_CHUNK", 16)
    monkeypatch.setattr(tiles, "CHUNK_SCORES", 1)
    x, table, d = (
        reference.normal(0, n, 8).astype(dtype),
        reference.normal(1, 29, 8),
        reference.normal(2, n),
    )
    target = jnp.asarray(np.random.default_rng(0).integers(0, 29, n), jnp.int32)
    inside = (jnp.arange(n) >= start) & (jnp.arange(n) < stop)

    def wanted(x, table):
        scores = x.astype(jnp.float32) @ table.astype(dtype).astype(jnp.float32).T
        nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), target[:, None], axis=1)[:, 0]
        return jnp.where(inside, nll, 0)

    found = jax.jit(
        lambda *a: pulled(lambda x, table: chunked_nll(x, table, target, start, stop), a, d)
    )(x, table)
    assert reference.error(found, pulled(wanted, (x, table), d)) < (
        1e-5 if dtype == "float32" else 1e-2
    )
