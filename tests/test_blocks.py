"""UoME and SMHA against dense references in value and gradient: equivalence, gates, backends, independence, padding."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.config import ModelConfig
from uoe_jax.config.routing import GATES
from uoe_jax.errors import UserError
from uoe_jax.layers import union
from uoe_jax.layers.attention import Attention
from uoe_jax.layers.common import Tokens, rotary_tables
from uoe_jax.layers.mlp import MLP
from uoe_jax.models.decoder import Transformer

B, L, D, F, H, N = 2, 16, 32, 32, 8, 4
ALL = RoutingConfig(n_experts=N, k=N, capacity_factor=1.0, capacity_window=5, gate="none")
# Two documents and padding in the first row (the second document and the padding end inside a patch of 4), one in the
# second; position counts inside the document.
SEGMENTS = np.array([[1] * 8 + [2] * 6 + [0] * 2, [1] * 16], np.int32)
POSITIONS = np.array([[*range(8), *range(8)], [*range(16)]], np.int32)


def tokens_of(segments: np.ndarray | None, positions: np.ndarray, head_dim: int = D // H) -> Tokens:
    rotary = rotary_tables(jnp.asarray(positions), head_dim, 1e4)
    return Tokens(
        None if segments is None else jnp.asarray(segments), jnp.asarray(positions), rotary
    )


def run(graphdef, state, x, tokens):
    return nnx.merge(graphdef, state)(x, tokens)


@functools.cache
def forward(graphdef):
    return reference.jit(functools.partial(run, graphdef))


def loss_of(graphdef, state, x, tokens, d):
    y, stats = run(graphdef, state, x, tokens)
    return (y.astype(jnp.float32) * d).sum(), (y, stats)


@functools.cache
def backward(graphdef):
    """(state, x, tokens, cotangent) -> ((_, (y, stats)), (gradient of the state, of x))."""
    return reference.jit(
        jax.value_and_grad(functools.partial(loss_of, graphdef), argnums=(0, 1), has_aux=True)
    )


# --- 1. equivalence ---------------------------------------------------------------------------------------------


def assert_equal_to_dense(union_block, dense_block, padded: bool) -> None:
    ok = SEGMENTS > 0 if padded else np.ones((B, L), bool)
    tokens = tokens_of(SEGMENTS if padded else None, POSITIONS)
    graphdef, state = reference.build(union_block)
    w = reference.weights_of(state)
    dense_graphdef, dense_state = reference.build(dense_block)
    merged = reference.merge(w)
    shapes = jax.tree.map(jnp.shape, reference.weights_of(dense_state))
    assert jax.tree.map(jnp.shape, merged) == shapes
    nnx.replace_by_pure_dict(dense_state, merged)
    x, d = (
        reference.normal(1, B, L, D),
        reference.normal(2, B, L, D) * ok[..., None].astype(np.float32),
    )
    (_, (y, stats)), (d_w, d_x) = backward(graphdef)(state, x, tokens, d)
    (_, (dense_y, _)), (dense_d_w, dense_d_x) = backward(dense_graphdef)(dense_state, x, tokens, d)
    assert float(stats.kept_N.sum()) == float(stats.chosen_N.sum()) and float(stats.untouched) == 0
    assert reference.error(y[ok], dense_y[ok]) < 1e-5
    assert reference.error(d_x, dense_d_x) < 1e-5
    d_w = reference.weights_of(d_w)
    assert reference.error(reference.merge(d_w), reference.weights_of(dense_d_w)) < 1e-5
    assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(d_w["router"]))
    assert not np.asarray(y)[~ok].any()


@pytest.mark.parametrize(
    "activation, bias, padded",
    [
        ("gelu", False, False), ("gelu", True, True), ("swiglu", True, False), ("swiglu", False, True),
        slow("gelu", False, True), slow("gelu", True, False), slow("swiglu", False, False), slow("swiglu", True, True),
        slow("geglu", True, True), slow("gelu_tanh", True, False), slow("relu", False, True),
    ],
)  # fmt: skip
def test_uome_is_the_mlp(activation, bias, padded):
    p, priority = (4, "score") if padded else (1, "position")
    routing = dataclasses.replace(ALL, patch_size=p, priority=priority, router_bias=bias)
    common = dict(activation=activation, bias=bias)
    assert_equal_to_dense(
        lambda: UoME(D, F, routing, **common, rngs=nnx.Rngs(0)),
        lambda: MLP(D, F, **common, rngs=nnx.Rngs(0)),
        padded,
    )


@pytest.mark.parametrize(
    "kv_heads, bias, padded, causal",
    [
        (0, True, True, True), (0, False, False, False), (4, False, True, False), (4, True, False, True), (4, True, True, False),
        slow(0, True, True, False), slow(0, True, False, True), slow(0, True, False, False), slow(4, True, True, True),
        slow(4, True, False, False), slow(0, False, True, True), slow(4, False, False, True), slow(4, False, True, True),
    ],
)  # fmt: skip
def test_smha_is_the_attention(kv_heads, bias, padded, causal):
    routing = dataclasses.replace(
        ALL, patch_size=4 if padded else 1, priority="position" if causal else "score"
    )
    common = dict(n_kv_heads=kv_heads, bias=bias, causal=causal)
    assert_equal_to_dense(
        lambda: SMHA(D, H, routing, **common, rngs=nnx.Rngs(0)),
        lambda: Attention(D, H, **common, rngs=nnx.Rngs(0)),
        padded,
    )


@pytest.mark.parametrize(
    "make",
    [lambda rngs: MLP(D, F, rngs=rngs), lambda rngs: Attention(D, H, rngs=rngs)],
    ids=["mlp", "attention"],
)
def test_dense_blocks_multiply_matrices(make):
    """Forward and backward: of a product of more axes XLA made a transposed copy on CPUs (`common.linear`)."""
    graphdef, weights = nnx.split(make(nnx.Rngs(0)))
    f = jax.jit(jax.grad(lambda w, x: nnx.merge(graphdef, w)(x)[0].sum(), argnums=(0, 1)))
    text = f.lower(weights, jax.ShapeDtypeStruct((B, L, D), jnp.float32)).as_text()
    unbatched = [
        line
        for line in text.splitlines()
        if "stablehlo.dot_general" in line and "batching_dims" not in line
    ]
    assert len(unbatched) >= 5
    for line in unbatched:
        left, right = re.findall(r"tensor<([0-9x]+)xf32>", line)[:2]
        assert left.count("x") == right.count("x") == 1, line


@pytest.mark.parametrize("kind", ["uome", "smha"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_at_a_zero_router_is_the_dense_block(gate, kind):
    routing = dataclasses.replace(ALL, gate=gate)
    make = {
        "uome": lambda: UoME(D, F, routing, rngs=nnx.Rngs(0)),
        "smha": lambda: SMHA(D, H, routing, causal=True, rngs=nnx.Rngs(0)),
    }
    graphdef, state = reference.build(make[kind])
    w = reference.weights_of(state)
    w["router"]["kernel"] = jnp.zeros((D, N))
    nnx.replace_by_pure_dict(state, w)
    x, tokens = reference.normal(1, B, L, D), tokens_of(SEGMENTS, POSITIONS)
    y, _ = forward(graphdef)(state, x, tokens)
    for row in range(B):
        ok = SEGMENTS[row] > 0
        if kind == "uome":
            wanted = reference.mlp(reference.merge(w), x[row], "gelu")
        else:
            wanted = reference.attention(
                reference.merge(w), x[row], reference.visible(SEGMENTS[row], True), POSITIONS[row]
            )
        assert reference.error(y[row][ok], wanted[ok]) < 1e-5


# --- 5. value and gradient against the dense reference -----------------------------------------------------------


class Case(NamedTuple):
    kind: str
    routing: RoutingConfig
    causal: bool = True
    options: dict = {}  # of the block

    def make(self, dtype: str = "float32") -> nnx.Module:
        common = dict(causal=self.causal, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)) | self.options
        return (
            UoME(D, F, self.routing, **common)
            if self.kind == "uome"
            else SMHA(D, H, self.routing, **common)
        )

    def reference(self, w, x, tokens: Tokens, chosen, kept):
        """[B,L,D], given who chose and who was kept (numpy, [B,M,N])."""
        options = dict(causal=self.causal, activation=self.options.get("activation", "gelu"))
        one_row = functools.partial(reference.union, w, r=self.routing, **options)
        return jax.vmap(one_row)(x, tokens.segments_BL, tokens.positions_BL, chosen, kept)

    def choices(self, w, x, tokens: Tokens):
        """(chosen, kept), bool [B,M,N]."""
        out = []
        for row in range(x.shape[0]):
            segments, p = np.asarray(tokens.segments_BL[row]), self.routing.patch_size
            logits = reference.router_logits(w, x[row], segments, p, self.causal)
            out.append(reference.select(logits, segments.reshape(-1, p).any(axis=1), self.routing))
        return tuple(map(np.stack, zip(*out)))


def route(**changes) -> RoutingConfig:
    return RoutingConfig(**dict(n_experts=N, k=2, capacity_factor=0.8, capacity_window=6) | changes)


score = functools.partial(route, priority="score")
CASES = {
    "uome sigmoid": Case("uome", route()),
    "uome normalized, biases": Case(
        "uome", route(gate="normalized", router_bias=True), options={"bias": True}
    ),
    "uome score, swiglu, P=4": Case(
        "uome",
        route(gate="score", patch_size=4, capacity_factor=0.6, capacity_window=3),
        options={"activation": "swiglu"},
    ),
    "uome straight through, not causal": Case(
        "uome", score(gate="straight_through", patch_size=2), causal=False
    ),
    "uome none, swiglu, biases": Case(
        "uome", score(gate="none"), False, {"activation": "swiglu", "bias": True}
    ),
    "uome scatter, P=4, biases": Case(
        "uome", score(dispatch="scatter", patch_size=4), False, {"bias": True}
    ),
    "uome one-hot, P=4": Case(
        "uome", route(dispatch="onehot", patch_size=4, capacity_factor=0.6, capacity_window=3)
    ),
    "smha one-hot, project, P=2": Case(
        "smha", score(dispatch="onehot", order="project", patch_size=2), False, {"bias": True}
    ),
    "uome one expert": Case("uome", route(n_experts=1, k=1)),
    "uome one slot": Case("uome", route(capacity_factor=0.01, capacity_window=64)),
    "uome project, swiglu, biases": Case(
        "uome", route(order="project"), options={"activation": "swiglu", "bias": True}
    ),
    "uome project, scatter, P=4": Case(
        "uome", score(order="project", dispatch="scatter", patch_size=4, capacity_factor=0.4), False
    ),
    "smha project, biases": Case("smha", route(order="project"), options={"bias": True}),
    "smha project, scatter, grouped, P=2": Case(
        "smha", score(order="project", dispatch="scatter", patch_size=2), False, {"n_kv_heads": 4}
    ),
    "smha sigmoid, biases": Case("smha", route(router_bias=True), options={"bias": True}),
    "smha normalized, P=2": Case("smha", route(gate="normalized", patch_size=2, k=3)),
    "smha score, not causal, P=4": Case(
        "smha", score(gate="score", patch_size=4, capacity_factor=0.6), False, {"bias": True}
    ),
    "smha straight through, grouped": Case(
        "smha", route(gate="straight_through"), options={"n_kv_heads": 4}
    ),
    "smha none, not causal, grouped": Case(
        "smha", score(gate="none"), False, {"n_kv_heads": 4, "bias": True}
    ),
    "smha scatter, expert choice": Case(
        "smha", score(dispatch="scatter", k=N, capacity_factor=0.5), False
    ),
    "smha scatter, P=4": Case(
        "smha", route(dispatch="scatter", patch_size=4, capacity_window=3, k=3)
    ),
    "smha one expert": Case("smha", route(n_experts=1, k=1, capacity_window=7)),
    "smha one slot": Case("smha", route(capacity_factor=0.01, capacity_window=64, k=1)),
}


def reference_backward(case: Case, w, x, tokens, d, chosen, kept):
    def both(w, x, chosen, kept):
        y, pull = jax.vjp(lambda w, x: case.reference(w, x, tokens, chosen, kept), w, x)
        return y, *pull(d)

    return reference.jit(both)(w, x, jnp.asarray(chosen), jnp.asarray(kept))


LONGER = (
    "uome none, swiglu, biases",
    "uome straight through, not causal",
    "smha none, not causal, grouped",
    "uome scatter, P=4, biases",
    "uome one expert",
    "uome one slot",
    "uome project, scatter, P=4",
    "smha project, biases",
    "smha sigmoid, biases",
    "smha one slot",
    "smha one expert",
)


@pytest.mark.parametrize("name", [slow(name) if name in LONGER else name for name in CASES])
def test_value_and_gradient(name):
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    w, tokens = reference.weights_of(state), tokens_of(SEGMENTS, POSITIONS)
    x, d = reference.normal(1, B, L, D), reference.normal(2, B, L, D)
    chosen, kept = case.choices(w, x, tokens)
    assert (chosen & ~kept).any()  # these cases drop
    (_, (y, stats)), (d_w, d_x) = backward(graphdef)(state, x, tokens, d)
    wanted, wanted_d_w, wanted_d_x = reference_backward(case, w, x, tokens, d, chosen, kept)
    d_w = reference.weights_of(d_w)
    assert reference.error(y, wanted) < 1e-5
    assert reference.error(d_x, wanted_d_x) < 1e-5
    assert reference.error(d_w, wanted_d_w) < 1e-5
    np.testing.assert_array_equal(stats.kept_N, kept.sum((0, 1)))
    assert not np.asarray(y)[SEGMENTS == 0].any()
    learns = case.routing.gate != "none" and not (N == 1 and case.routing.gate != "sigmoid")
    for g in jax.tree.leaves(d_w["router"]):
        assert np.isfinite(g).all() and (np.abs(g).max() > 1e-4 if learns else np.abs(g).max() == 0)


@pytest.mark.parametrize("name", ["uome normalized, biases", "smha sigmoid, biases"])
def test_all_tokens_prefer_the_same_experts(name):
    """Two experts are full and drop most of what comes, the other two are empty: values and gradients of the reference."""
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    state["router"]["kernel"] = jax.tree.map(lambda a: 0.2 * a, state["router"]["kernel"])
    state["router"]["bias"] = jax.tree.map(
        lambda a: a + jnp.asarray([2.5, 2.0, -2.0, -2.5]), state["router"]["bias"]
    )
    w, tokens = reference.weights_of(state), tokens_of(SEGMENTS, POSITIONS)
    x, d = reference.normal(1, B, L, D), reference.normal(2, B, L, D)
    chosen, kept = case.choices(w, x, tokens)
    assert kept[..., :2].any() and not chosen[..., 2:].any() and kept.sum() < 0.6 * chosen.sum()
    (_, (y, stats)), (d_w, d_x) = backward(graphdef)(state, x, tokens, d)
    wanted, wanted_d_w, wanted_d_x = reference_backward(case, w, x, tokens, d, chosen, kept)
    assert reference.error(y, wanted) < 1e-5 and reference.error(d_x, wanted_d_x) < 1e-5
    assert reference.error(reference.weights_of(d_w), wanted_d_w) < 1e-5
    np.testing.assert_array_equal(stats.chosen_N, chosen.sum((0, 1)))


@pytest.mark.parametrize(
    "name, backend",
    [
        ("uome score, swiglu, P=4", "inverse"), ("smha sigmoid, biases", "scatter"),
        slow("uome score, swiglu, P=4", "scatter"), slow("smha sigmoid, biases", "inverse"),
    ],
)  # fmt: skip
def test_bfloat16_given_the_same_selection(name, backend):
    case = CASES[name]
    case = case._replace(routing=dataclasses.replace(case.routing, dispatch=backend))
    graphdef, state = reference.build(functools.partial(case.make, "bfloat16"))
    rounded = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), state
    )  # so that rounding is the block's own
    x, d = (reference.normal(i, B, L, D).astype(jnp.bfloat16) for i in (1, 2))
    w, tokens = reference.weights_of(rounded), tokens_of(SEGMENTS, POSITIONS)
    x32, d32 = x.astype(jnp.float32), d.astype(jnp.float32)
    chosen, kept = case.choices(w, x32, tokens)
    (_, (y, stats)), (d_w, d_x) = backward(graphdef)(rounded, x, tokens, d32)
    np.testing.assert_array_equal(
        stats.kept_N, kept.sum((0, 1))
    )  # the router is float32: the same selection
    wanted, wanted_d_w, wanted_d_x = reference_backward(case, w, x32, tokens, d32, chosen, kept)
    assert y.dtype == jnp.bfloat16
    assert reference.norm_error(y, wanted) < 1e-2
    assert reference.norm_error(d_x, wanted_d_x) < 1e-2
    assert reference.norm_error(reference.weights_of(d_w), wanted_d_w) < 1e-2


@pytest.mark.parametrize("name", ["uome sigmoid", "smha none, not causal, grouped"])
def test_the_balance_losses_reach_the_router(name):
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    x, tokens = reference.normal(1, B, L, D), tokens_of(SEGMENTS, POSITIONS)

    @jax.jit
    def grads(state):
        def loss(state, which):
            return getattr(run(graphdef, state, x, tokens)[1], which)

        return {which: jax.grad(loss)(state, which) for which in ("balance", "z")}

    for g in grads(state).values():
        for path, leaf in reference.flat(reference.weights_of(g)):
            assert np.isfinite(leaf).all() and (np.abs(leaf).max() > 1e-4) == ("router" in path)


# --- empty slots ------------------------------------------------------------------------------------------------


GARBAGE = [
    "uome normalized, biases",
    "smha sigmoid, biases",
    "smha score, not causal, P=4",
    "smha scatter, P=4",
]
GARBAGE += [
    "uome project, swiglu, biases",
    "smha project, scatter, grouped, P=2",
    "smha one-hot, project, P=2",
]


@pytest.mark.parametrize("name", GARBAGE)
def test_what_an_empty_slot_holds_is_never_seen(name, monkeypatch):
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    x, d, tokens = (
        reference.normal(1, B, L, D),
        reference.normal(2, B, L, D),
        tokens_of(SEGMENTS, POSITIONS),
    )
    clean = backward(graphdef)(state, x, tokens, d)
    seen = []

    def with_garbage(gather):
        def gather_with_garbage(x, selection, backend):
            seen.append(selection.valid_NRC.shape)
            return jnp.where(selection.valid_NRC[..., None], gather(x, selection, backend), 1e3)

        return gather_with_garbage

    for gather in ("gather_slots", "gather_own"):
        monkeypatch.setattr(union, gather, with_garbage(getattr(union, gather)))
    dirty = backward.__wrapped__(graphdef)(state, x, tokens, d)
    assert seen
    assert reference.error(dirty, clean) < 1e-6


# --- 3. independence and padding --------------------------------------------------------------------------------

INDEPENDENT = [
    "uome sigmoid",
    "uome scatter, P=4, biases",
    "smha sigmoid, biases",
    "smha score, not causal, P=4",
    "smha scatter, P=4",
]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_row_is_alone(name):
    """Not moved by the other row, by the batch size, or by more padding on its right."""
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    f = forward(graphdef)
    x, tokens = reference.normal(1, B, L, D), tokens_of(SEGMENTS, POSITIONS)
    y, stats = f(state, x, tokens)
    other, _ = f(
        state,
        x.at[1].set(reference.normal(7, L, D)),
        tokens_of(np.stack([SEGMENTS[0], SEGMENTS[0]]), POSITIONS),
    )
    np.testing.assert_array_equal(other[0], y[0])
    assert np.abs(other[1] - y[1]).max() > 0.1
    swapped, _ = f(state, x[::-1], tokens_of(SEGMENTS[::-1], POSITIONS[::-1]))
    assert reference.error(swapped[::-1], y) < 1e-6
    # The same rows with 32 tokens of padding, of arbitrary content, in a batch with a row of nothing but padding.
    long = jnp.concatenate([jnp.concatenate([x, x[:1]]), reference.normal(8, B + 1, 32, D)], axis=1)
    wide = (np.pad(a, ((0, 1), (0, 32))) for a in (SEGMENTS, POSITIONS))
    padded, padded_stats = f(state, long, tokens_of(*wide))
    assert reference.error(padded[:B, :L], y) < 1e-6
    assert not np.asarray(padded)[:, L:].any() and not np.asarray(padded)[B].any()
    for field in ("balance", "z", "patches", "untouched", "entropy", "chosen_N", "kept_N"):
        np.testing.assert_allclose(getattr(padded_stats, field), getattr(stats, field), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["uome normalized, biases", "uome scatter, P=4, biases", *INDEPENDENT[2:]]
)
def test_a_row_of_padding_gives_zeros_and_no_gradient(name):
    case = CASES[name]
    graphdef, state = reference.build(case.make)
    x, d = reference.normal(1, B, L, D), reference.normal(2, B, L, D)
    f = backward(graphdef)
    nothing = np.stack([np.zeros_like(SEGMENTS[1]), SEGMENTS[0]])
    (_, (y, stats)), (d_w, d_x) = f(state, x, tokens_of(nothing, POSITIONS[::-1]), d)
    assert not np.asarray(y[0]).any() and not np.asarray(d_x[0]).any()
    assert np.abs(y[1]).max() > 0.1 and float(stats.patches) == -(-14 // case.routing.patch_size)
    other = (x.at[0].set(100.0), tokens_of(nothing, POSITIONS[::-1]), d.at[0].set(-100.0))
    (_, (other_y, other_stats)), grads = f(state, *other)
    np.testing.assert_array_equal(y, other_y)
    assert reference.error((stats, d_w, d_x), (other_stats, *grads)) < 1e-6
    (_, (y, stats)), grads = f(state, x, tokens_of(np.zeros_like(SEGMENTS), POSITIONS), d)
    assert not any(np.asarray(a).any() for a in jax.tree.leaves((y, stats, grads)))


PACKED = {
    "causal": dict(
        causal=True, smha=route(capacity_factor=2.0, patch_size=2), uome=route(capacity_factor=2.0)
    ),
    "K=N": dict(
        causal=True, smha=route(k=N, capacity_factor=1.0), uome=route(k=N, capacity_factor=1.0)
    ),
    "by score": dict(
        causal=False, smha=score(capacity_factor=2.0), uome=score(capacity_factor=2.0, patch_size=4)
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_documents_of_a_packed_row_do_not_meet(name):
    """Where nothing is dropped: a document's logits are those it has alone, whatever the other one says."""
    config = ModelConfig(
        vocab_size=11,
        d_model=D,
        n_layers=2,
        n_heads=H,
        d_hidden=F,
        context_length=L,
        bias=True,
        **PACKED[name],
    )
    graphdef, state = reference.build(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    f = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    a, b = np.random.default_rng(0).integers(0, 11, (2, 8), np.int32)
    segments = np.repeat(np.array([[1] * 8 + [2] * 4 + [0] * 4], np.int32), 2, axis=0)
    positions = np.array([[*range(8), *range(8)]] * 2, np.int32)
    rows = np.stack([np.concatenate([a, b]), np.concatenate([(a + 3) % 11, b])])
    (y, other), stats = f(state, rows, segments, positions)
    assert all(float(s.chosen_N.sum() - s.kept_N.sum()) == 0 for s in stats.values())
    assert reference.error(other[8:12], y[8:12]) < 1e-6
    if name == "K=N":  # the same slots either way
        np.testing.assert_array_equal(other[8:12], y[8:12])
    assert np.abs(other[:8] - y[:8]).max() > 0.01
    lengths = np.array([[8], [4]])
    alone = (
        np.stack([np.concatenate([a, b]), np.concatenate([b, a])]),
        (np.arange(L)[None] < lengths).astype(np.int32),
    )
    (first, second), _ = f(state, *alone, np.broadcast_to(np.arange(L, dtype=np.int32), (2, L)))
    assert reference.error(y[:8], first[:8]) < 1e-5
    assert reference.error(y[8:12], second[:4]) < 1e-5
    # And the other way round: the second document does not reach the first, in either kind of model.
    swapped, _ = f(state, np.stack([np.concatenate([a, (b + 3) % 11])] * 2), segments, positions)
    assert reference.error(swapped[0, :8], y[:8]) < 1e-6


@pytest.mark.parametrize("priority", [slow("position"), "score"])
def test_right_padding_of_a_model(priority):
    """A row of 24 alone, and padded to 64."""
    routing = dataclasses.replace(
        score() if priority == "score" else route(), patch_size=4, capacity_window=4
    )
    config = ModelConfig(
        vocab_size=11, d_model=D, n_layers=2, n_heads=H, d_hidden=F, context_length=64, causal=priority == "position",
        smha=routing, uome=dataclasses.replace(routing, patch_size=1),
    )  # fmt: skip
    graphdef, state = reference.build(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    f = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    row = np.random.default_rng(0).integers(0, 11, (3, 64), np.int32)
    segments = (np.arange(64)[None] < np.array([[24], [22], [64]])).astype(np.int32)
    y, stats = f(state, row, segments)
    alone, _ = f(state, row[:2, :24], segments[:2, :24])
    assert all(
        float(s.chosen_N.sum() - s.kept_N.sum()) > 0 for s in stats.values()
    )  # capacity is tight
    assert reference.error(y[0, :24], alone[0]) < 1e-6
    assert reference.error(y[1, :22], alone[1, :22]) < 1e-6


@pytest.mark.parametrize(
    "values, said",
    [
        ({"gate": "sigmod"}, "routing.gate='sigmod'"),
        ({"k": 9}, "routing.k=9"),
        ({"k": 2.0}, "routing.k=2.0"),
        ({"unit": "patchy"}, "routing.unit='patchy'"),
    ],
)
def test_a_routing_made_by_hand_is_checked(values, said):
    """A misspelled gate must not become another one."""
    with pytest.raises((ValueError, UserError), match=re.escape(said)):
        UoME(
            16,
            32,
            RoutingConfig(**{"n_experts": 8, "k": 2, **values}),
            causal=True,
            rngs=nnx.Rngs(0),
        )
