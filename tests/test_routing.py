"""Routing and dispatch alone: capacity, selection, counts and gates against brute force; both backends, garbage in empty slots."""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from uoe_jax import config
from uoe_jax.config import RoutingConfig
from uoe_jax.config.routing import GATES
from uoe_jax.errors import ConfigError
from uoe_jax.moe import dispatch, routing
from uoe_jax.moe.dispatch import Selection, all_sequences

B, M, N, C = 3, 13, 4, 5
few = functools.partial(
    settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
seeds = st.integers(0, 2**32 - 1)


def some_validity(rng: np.random.Generator, m: int = M) -> np.ndarray:
    """bool [B,m]: a row with holes, a row padded on the right, and a row that is full or only padding."""
    full = np.full(m, rng.random() < 0.5)
    return np.stack([rng.random(m) < rng.random(), np.arange(m) < rng.integers(0, m + 1), full])


# --- capacity ---------------------------------------------------------------------------------------------------


@few(max_examples=200)
@given(
    digits=st.integers(1, 4000),
    places=st.integers(0, 3),
    m=st.integers(1, 130),
    n=st.integers(1, 9),
    data=st.data(),
)
@example(digits=11, places=1, m=100, n=2, data=None)  # 1.1 * 100 / 2 is 55.00000000000001 in binary
@example(digits=7, places=1, m=10, n=1, data=None)
@example(digits=1, places=3, m=1, n=9, data=None)
def test_capacity_is_exact(digits, places, m, n, data):
    k = 1 if data is None else data.draw(st.integers(1, n))
    factor = float(f"{digits}e-{places}")
    wanted = Fraction(digits, 10**places) * m * k / n
    got = RoutingConfig(n_experts=n, k=k, capacity_factor=factor).window_capacity(m)
    assert (
        got
        == min(max(1, -(-wanted.numerator // wanted.denominator)), m)
        == reference.capacity(factor, m, k, n)
    )


@pytest.mark.parametrize(
    "factor, window, k, n, slots",
    [
        (1.1, 100, 1, 2, 55),
        (0.7, 10, 4, 4, 7),
        (1.0, 64, 4, 8, 32),
        (0.1, 30, 1, 3, 1),
        (3.0, 7, 1, 3, 7),
    ],
)
def test_capacity_by_hand(factor, window, k, n, slots):
    r = RoutingConfig(n_experts=n, k=k, capacity_factor=factor, capacity_window=window)
    assert r.window_capacity() == slots == r.slots(window)
    assert r.slots(3 * window) == 3 * slots


@few(max_examples=200)
@given(
    factor=st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.1, 2.0]),
    m=st.integers(1, 40),
    window=st.integers(1, 45),
    k=st.integers(1, 4),
)
def test_the_buffer_holds_the_fullest_row_and_no_more(factor, m, window, k):
    r = RoutingConfig(n_experts=4, k=k, capacity_factor=factor, capacity_window=window)
    kept = reference.keep_by_position(
        np.ones((m, 1), bool), window, reference.capacity(factor, window, k, 4)
    )
    assert r.slots(m) == kept.sum()
    by_score = RoutingConfig(
        n_experts=4, k=k, capacity_factor=factor, capacity_window=window, priority="score"
    )
    assert by_score.slots(m) == reference.capacity(factor, m, k, 4)
    assert all(by_score.slots(i) <= by_score.slots(m) for i in range(1, m))


# --- who is taken -----------------------------------------------------------------------------------------------


@few(max_examples=40)
@given(seed=seeds, k=st.sampled_from([1, 2, 3, N]), ties=st.booleans())
def test_choose_experts(seed, k, ties):
    rng = np.random.default_rng(seed)
    scores = (
        rng.integers(0, 3, (B, M, N)).astype(np.float32)
        if ties
        else rng.random((B, M, N), np.float32)
    )
    valid = some_validity(rng)
    got = routing.choose_experts(jnp.asarray(scores), jnp.asarray(valid), k)
    np.testing.assert_array_equal(got, [reference.choose(s, v, k) for s, v in zip(scores, valid)])
    assert set(np.asarray(got).sum(-1)[valid]) <= {k}


@few(max_examples=40)
@given(
    seed=seeds,
    density=st.sampled_from([0.2, 0.7, 1.0]),
    shape=st.sampled_from([(1, 1), (4, 1), (4, 3), (5, 2), (13, 4), (13, 13), (40, 6), (40, 20)]),
)
def test_first_come(seed, density, shape):
    chosen = np.random.default_rng(seed).random((B, M, N)) < density
    got = routing.keep_by_position(jnp.asarray(chosen), *shape)
    np.testing.assert_array_equal(got, [reference.keep_by_position(c, *shape) for c in chosen])


@few(max_examples=40)
@given(
    seed=seeds,
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    slots=st.sampled_from([1, 5, M]),
    ties=st.booleans(),
)
def test_best_first(monkeypatch, seed, density, slots, ties):
    rng = np.random.default_rng(seed)
    chosen = rng.random((B, M, N)) < density
    scores = (
        rng.integers(0, 3, (B, M, N)).astype(np.float32)
        if ties
        else rng.random((B, M, N), np.float32)
    )
    cap = rng.integers(0, slots + 1, B)
    wanted = [reference.keep_by_score(*row) for row in zip(chosen, scores, cap)]
    for many in (1, M + 1):  # by counting, by sorting
        monkeypatch.setattr(routing, "MANY", many)
        got = routing.keep_by_score(
            jnp.asarray(chosen), jnp.asarray(scores), jnp.asarray(cap), slots
        )
        np.testing.assert_array_equal(got, wanted)


def test_counting_finds_what_sorting_finds_among_many():
    """Of 3000 patches, with ties, scores that are 0, tiny or denormal, and experts that few or none came to."""
    rng = np.random.default_rng(0)
    scores = rng.choice(np.float32([0, 1e-45, 1e-38, 0.25, 0.5, 1 - 2**-24, 1]), (3, 4, 3000))
    scores = np.where(rng.random(scores.shape) < 0.5, rng.random(scores.shape, np.float32), scores)
    offered = jnp.asarray(
        np.where(rng.random(scores.shape) < np.array([0, 0.001, 0.5, 1])[None, :, None], scores, -1)
    )
    for capacity in (0, 1, 7, 1500, 3000):
        args = offered, jnp.asarray([capacity, capacity // 2, 1]), max(capacity, 1)
        np.testing.assert_array_equal(
            jax.jit(routing.by_counting, static_argnums=2)(*args), routing.by_sorting(*args)
        )


def test_all_want_one_expert():
    chosen = np.zeros((1, M, N), bool)
    chosen[:, :, 2] = True
    got = np.asarray(routing.keep_by_position(jnp.asarray(chosen), 5, 2))
    assert np.flatnonzero(got[0, :, 2]).tolist() == [0, 1, 5, 6, 10, 11] and got.sum() == 6
    logits, valid = jnp.where(jnp.asarray(chosen), 9.0, 0.0), jnp.ones((1, M), bool)
    for r, kept in (
        (RoutingConfig(n_experts=N, k=1, capacity_window=4), 1 + 1 + 1 + 1),
        (ROUTINGS["score"], 8),
    ):
        _, stats = selector(r)(logits, valid)  # 4 windows of 1 slot; ceil(1.1 * 13 * 2 / 4) slots
        assert float(stats.chosen_N[2]) == M and float(stats.kept_N[2]) == kept
    scores = np.linspace(0, 1, M, dtype=np.float32)[None, :, None] * np.ones((1, 1, N), np.float32)
    got = np.asarray(
        routing.keep_by_score(jnp.asarray(chosen), jnp.asarray(scores), jnp.asarray([3]), 5)
    )
    assert np.flatnonzero(got[0, :, 2]).tolist() == [10, 11, 12] and got.sum() == 3


# --- the selection and its counts -------------------------------------------------------------------------------


def packed(kept_BMN: np.ndarray, weights_BMN: np.ndarray, c: int) -> Selection:
    """The Selection that says what `kept` says, slot by slot."""
    b, m, n = kept_BMN.shape
    slots, valid = np.zeros((n, b, c), np.int32), np.zeros((n, b, c), bool)
    weights, slot_of = np.zeros((n, b, c), np.float32), np.full((b, m, n), c, np.int32)
    for e, row in np.ndindex(n, b):
        for slot, patch in enumerate(np.flatnonzero(kept_BMN[row, :, e])):
            slots[e, row, slot], valid[e, row, slot], slot_of[row, patch, e] = patch, True, slot
            weights[e, row, slot] = weights_BMN[row, patch, e]
    return Selection(*map(jnp.asarray, (slots, valid, weights, slot_of)), *all_sequences(b, n))


ROUTINGS = {
    "windows": RoutingConfig(n_experts=N, k=2, capacity_factor=0.7, capacity_window=4),
    "one window": RoutingConfig(
        n_experts=N, k=3, capacity_factor=0.5, capacity_window=64, gate="normalized"
    ),
    "one slot": RoutingConfig(
        n_experts=N, k=1, capacity_factor=0.01, capacity_window=M, gate="score"
    ),
    "one slot by score": RoutingConfig(
        n_experts=N, k=2, capacity_factor=0.01, priority="score", gate="none"
    ),
    "score": RoutingConfig(n_experts=N, k=2, capacity_factor=1.1, priority="score"),
    "expert choice": RoutingConfig(
        n_experts=N, k=N, capacity_factor=0.3, priority="score", gate="straight_through"
    ),
    "all": RoutingConfig(n_experts=N, k=N, capacity_factor=1.0, capacity_window=8),
    "one expert": RoutingConfig(n_experts=1, k=1, capacity_factor=0.6, capacity_window=5),
    "one expert by score": RoutingConfig(n_experts=1, k=1, capacity_factor=0.6, priority="score"),
}


@functools.cache
def selector(r: RoutingConfig):
    return jax.jit(lambda logits, valid: reference.selected(logits, valid, r))


@pytest.mark.parametrize("m", [M, 2])
@pytest.mark.parametrize("name", ROUTINGS)
@few(max_examples=15)
@given(seed=seeds, skew=st.sampled_from([0.0, 3.0, 30.0]))
def test_select(name, m, seed, skew):
    r = ROUTINGS[name]
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, m, r.n_experts)).astype(np.float32)
    logits[..., 0] += skew  # at 30 every patch wants expert 0
    valid = some_validity(rng, m)
    selection, stats = selector(r)(jnp.asarray(logits), jnp.asarray(valid))
    chosen, kept = map(np.stack, zip(*(reference.select(*row, r) for row in zip(logits, valid))))
    np.testing.assert_array_equal(selection.kept_BMN, kept)
    weights = np.stack(
        [
            np.asarray(reference.gate(r.gate, jnp.asarray(l), jnp.asarray(c), r.k))
            for l, c in zip(logits, chosen)
        ]
    )
    for got, wanted in zip(selection, packed(kept, weights, r.slots(m))):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-9)
    counts = reference.stats(logits, valid, r)
    assert set(counts) == set(stats._fields)
    for field in stats._fields:
        np.testing.assert_allclose(
            getattr(stats, field), counts[field], rtol=1e-5, atol=1e-5, err_msg=field
        )
    dropped = chosen.sum() - kept.sum()
    assert (
        float(stats.chosen_N.sum() - stats.kept_N.sum())
        == float(stats.chosen_4.sum() - stats.kept_4.sum())
        == dropped
    )


def test_an_even_load_has_balance_one():
    logits = jnp.asarray(30 * np.tile(np.eye(N, dtype=np.float32), (3, 1)))[None]
    _, stats = selector(RoutingConfig(n_experts=N, k=1, capacity_factor=2.0))(
        logits, jnp.ones((1, 12), bool)
    )
    np.testing.assert_allclose(stats.balance, 1, rtol=1e-5)
    np.testing.assert_allclose(stats.kept_N, [3] * N)
    assert stats.untouched.item() == 0 and stats.entropy.item() < 1e-5


# --- gates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, N])
@pytest.mark.parametrize("name", GATES)
def test_gates_are_one_where_the_router_is_undecided(name, k):
    logits = jnp.zeros((B, M, N))
    chosen = routing.choose_experts(logits, jnp.ones((B, M), bool), k)
    got = routing.gate(name, logits, jax.nn.softmax(logits, axis=-1), chosen, k)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got)[np.asarray(chosen)], 1, rtol=1e-6)


@pytest.mark.parametrize("k", [2, N])
@pytest.mark.parametrize("name", GATES)
def test_gates_and_their_gradients(name, k):
    logits, cotangent = reference.normal(1, B, M, N), reference.normal(2, B, M, N)
    chosen = routing.choose_experts(logits, jnp.ones((B, M), bool), k)

    def ours(l):
        return jnp.where(chosen, routing.gate(name, l, jax.nn.softmax(l, axis=-1), chosen, k), 0)

    value, pull = jax.vjp(ours, logits)
    wanted, wanted_pull = jax.vjp(
        lambda l: jnp.where(chosen, reference.gate(name, l, chosen, k), 0), logits
    )
    assert reference.error(value, wanted) < 1e-5
    assert reference.error(pull(cotangent), wanted_pull(cotangent)) < 1e-5
    assert (np.abs(pull(cotangent)[0]).max() == 0) == (name == "none")
    if name == "normalized":
        np.testing.assert_allclose(value.sum(-1), k, rtol=1e-5)
    if name == "straight_through":
        np.testing.assert_allclose(value, np.asarray(chosen, np.float32), rtol=1e-6)


def test_normalized_with_one_choice_is_refused():
    with pytest.raises(ConfigError, match="k=1"):
        config.from_dict({"model": {"uome": {"gate": "normalized", "k": 1}}})


# --- dispatch ---------------------------------------------------------------------------------------------------


def random_kept(rng: np.random.Generator) -> np.ndarray:
    """bool [B,M,N] with at most C patches for each expert and sequence; some expert is empty, some is full."""
    kept = np.zeros((B, M, N), bool)
    for row, e in np.ndindex(B, N):
        count = (0, C)[e] if row == 0 and e < 2 else rng.integers(0, C + 1)
        kept[row, rng.permutation(M)[:count], e] = True
    return kept


@functools.cache
def gather_and_back(backend: str):
    return jax.jit(
        lambda x, s, d: (lambda y, pull: (y, pull(d)[0]))(
            *jax.vjp(lambda x: dispatch.gather_slots(x, s, backend), x)
        )
    )


@functools.cache
def combine_and_back(backend: str):
    return jax.jit(
        lambda y, s, d: (lambda o, pull: (o, pull(d)[0]))(
            *jax.vjp(lambda y: dispatch.combine_slots(y, s, backend), y)
        )
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@few(max_examples=8)
@given(seed=seeds, garbage=st.sampled_from([0.0, 1e30, float("nan")]))
def test_dispatch(backend, dtype, seed, garbage):
    rng, f = np.random.default_rng(seed), 6
    kept = random_kept(rng)
    selection = packed(kept, np.ones(kept.shape, np.float32), C)
    empty = ~np.asarray(selection.valid_NRC)
    x_BMF = np.asarray(jnp.asarray(rng.normal(size=(B, M, f)), dtype))
    y_NBCF = np.array(jnp.asarray(rng.normal(size=(N, B, C, f)), dtype))
    y_NBCF[empty] = garbage
    slots_BMNF, sum_BMF = np.zeros((N, B, C, f)), np.zeros((B, M, f))
    for e, row in np.ndindex(N, B):
        for slot, patch in enumerate(np.flatnonzero(kept[row, :, e])):
            slots_BMNF[e, row, slot] = x_BMF[row, patch]
            sum_BMF[row, patch] += y_NBCF[e, row, slot]

    # Each is the other's transpose, so the two loops above give both values and both gradients.
    gathered, d_x = gather_and_back(backend)(x_BMF, selection, y_NBCF)
    combined, d_y = combine_and_back(backend)(y_NBCF, selection, x_BMF)
    error, tolerance = (
        (reference.error, 1e-5) if dtype == "float32" else (reference.norm_error, 1e-2)
    )
    for got, wanted in (
        (gathered, slots_BMNF),
        (combined, sum_BMF),
        (d_x, sum_BMF),
        (d_y, slots_BMNF),
    ):
        assert got.dtype == jnp.dtype(dtype)
        got = np.asarray(got, np.float64)
        assert (
            error(np.where(empty[..., None], 0, got) if got.ndim == 4 else got, wanted) < tolerance
        )


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_garbage_in_empty_slots_changes_nothing(backend, garbage):
    rng = np.random.default_rng(0)
    kept = random_kept(rng)
    selection = packed(kept, np.ones(kept.shape, np.float32), C)
    x, w, d = (
        reference.normal(1, B, M, 6),
        reference.normal(2, N, 6, 6),
        reference.normal(3, B, M, 6),
    )

    def loss(x, w, fill):
        y = jnp.einsum("nbcf,nfg->nbcg", dispatch.gather_slots(x, selection, backend), w)
        y = jnp.where(selection.valid_NRC[..., None], y, fill)
        out = dispatch.combine_slots(y, selection, backend)
        return (out * d).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    clean, dirty = run(x, w, jnp.float32(0)), run(x, w, jnp.float32(garbage))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty)):
        assert np.isfinite(a).all() and np.abs(a).max() > 0
        np.testing.assert_array_equal(a, b)


def test_the_backend_follows_platform_dtype_and_patches(monkeypatch):
    def chosen(platform, name="auto", dtype="float32", patch_size=1, bounded=False):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        return dispatch.backend_for(name, jnp.dtype(dtype), patch_size, bounded)

    assert (
        chosen("cpu")
        == chosen("gpu")
        == chosen("tpu")
        == chosen("gpu", dtype="bfloat16")
        == "inverse"
    )
    assert chosen("cpu", dtype="bfloat16", patch_size=16) == "scatter"
    assert (
        chosen("tpu", patch_size=16) == "onehot"
        and chosen("tpu", patch_size=16, bounded=True) == "inverse"
    )
    assert [chosen("tpu", name, patch_size=16) for name in dispatch.BACKENDS] == list(
        dispatch.BACKENDS
    )
