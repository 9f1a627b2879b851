"""The contracts of both routed blocks as properties: random shapes, routings and padding against the dense reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.config.routing import GATES
from uoe_jax.layers.attention import Attention
from uoe_jax.layers.common import Tokens, rotary_tables
from uoe_jax.layers.mlp import MLP

# Every example compiles a block of its own, so shrinking a failure is not worth its hour: the failing case is printed.
examples = functools.partial(
    settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate), print_blob=True,
)  # fmt: skip


class Case(NamedTuple):
    """A block and a batch for it; the heads have width 4, the hidden columns of an expert are 3."""

    kind: str
    routing: RoutingConfig
    causal: bool
    heads: int  # key heads of an expert; twice as many query heads where `grouped`
    grouped: bool
    bias: bool
    activation: str
    rotary: bool
    qk_norm: bool
    batch: int
    length: int
    seed: int

    def make(self, dtype: str = "float32", dense: bool = False) -> nnx.Module:
        n = self.routing.n_experts
        g = n * self.heads
        h = g * (1 + self.grouped)
        common = dict(bias=self.bias, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        route = () if dense else (self.routing,)
        if self.kind == "smha":
            block = Attention if dense else SMHA
            eps = 1e-6 if self.qk_norm else None
            return block(
                4 * h, h, *route, n_kv_heads=g, causal=self.causal, qk_norm_eps=eps, **common
            )
        causal = {} if dense else {"causal": self.causal}
        return (MLP if dense else UoME)(
            12, 3 * n, *route, activation=self.activation, **causal, **common
        )

    @property
    def width(self) -> int:
        return (
            4 * self.routing.n_experts * self.heads * (1 + self.grouped)
            if self.kind == "smha"
            else 12
        )

    def batch_of(self, dtype: str = "float32"):
        """(x, cotangent, tokens): rows of one or two documents, right padding, perhaps a row of padding only."""
        rng = np.random.default_rng(self.seed)
        p, shape = self.routing.patch_size, (self.batch, self.length)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row in range(self.batch):
            end = rng.integers(0, self.length + 1) if row else self.length
            cut = rng.integers(0, end + 1) // p * p  # a patch never holds two documents
            for document, (lo, hi) in enumerate(((0, cut), (cut, end)), start=1):
                segments[row, lo:hi] = document
                positions[row, lo:hi] = np.arange(hi - lo)
        x, d = (jnp.asarray(rng.normal(size=(*shape, self.width)), dtype) for _ in range(2))
        positions = jnp.asarray(positions)
        tables = rotary_tables(positions, 4, 1e4) if self.kind == "smha" and self.rotary else None
        return x, d, Tokens(jnp.asarray(segments), positions, tables)

    def filled_up(self, *arrays):
        """Rows, [B,L,…], with the last patch filled up by padding."""
        more = -self.length % self.routing.patch_size
        return [
            np.pad(a, ((0, 0), (0, more), *((0, 0),) * (a.ndim - 2)))
            for a in map(np.asarray, arrays)
        ]

    def dense(self, w: dict, x, d, tokens: Tokens):
        """(y, d_w, d_x, chosen, kept, who is valid) by the reference, row by row."""
        r = self.routing
        x, d, segments, positions = self.filled_up(x, d, tokens.segments_BL, tokens.positions_BL)
        valid = (segments > 0).reshape(self.batch, -1, r.patch_size).any(axis=2)
        picks = []
        for row in range(self.batch):
            patch = (
                None
                if r.unit == "sequence"
                else reference.router_logits(w, x[row], segments[row], r.patch_size, self.causal)
            )
            whole = (
                None if r.unit == "patch" else reference.sequence_logits(w, x[row], segments[row])
            )
            asking = [
                a
                for a in (patch if patch is None else patch[valid[row]], whole)
                if a is not None and valid[row].any()
            ]
            for ranked in asking:  # a near tie may fall either way by rounding
                gaps = np.diff(np.sort(np.asarray(ranked), axis=-1))
                assume(not gaps.size or gaps.min() > 1e-5)
            picks.append(reference.select(patch, valid[row], r, whole))
        chosen, kept = map(np.stack, zip(*picks))

        def forward(w, x):
            options = dict(r=r, causal=self.causal, activation=self.activation)

            def one(x, s, p, c, k):
                return reference.union(w, x, s, p if self.rotary else None, c, k, **options)

            return jax.vmap(one)(x, segments, positions, chosen, kept)

        y, pull = reference.jit(lambda w, x: jax.vjp(forward, w, x))(w, x)
        d_w, d_x = pull(jnp.asarray(d))
        return y[:, : self.length], d_w, d_x[:, : self.length], chosen, kept, valid


@st.composite
def routings(draw, causal: bool, everyone: bool = False) -> RoutingConfig:
    n = draw(st.sampled_from([1, 2, 4, 5]))
    k = n if everyone else draw(st.integers(1, n))
    unit = (
        "patch"
        if causal or everyone
        else draw(st.sampled_from(["patch", "sequence", "hierarchical"]))
    )
    return RoutingConfig(
        n_experts=n,
        k=k,
        unit=unit,
        priority="position" if causal else draw(st.sampled_from(["position", "score"])),
        capacity_factor=1.0 if everyone else draw(st.sampled_from([0.01, 0.5, 0.8, 1.0, 1.3, 2.0])),
        capacity_window=draw(st.sampled_from([1, 2, 3, 5, 64])),
        patch_size=draw(st.sampled_from([1, 1, 2, 3, 8, 16])),
        gate=draw(st.sampled_from([g for g in GATES if k > 1 or g != "normalized"])),
        order=draw(st.sampled_from(["gather", "project"])),
        dispatch=draw(st.sampled_from(["inverse", "scatter"])),
        router_bias=draw(st.booleans()),
    )


@st.composite
def cases(draw, everyone: bool = False) -> Case:
    causal = draw(st.booleans())
    return Case(
        kind=draw(st.sampled_from(["smha", "uome"])),
        routing=draw(routings(causal, everyone)),
        causal=causal,
        heads=draw(st.integers(1, 2)),
        grouped=draw(st.booleans()),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        rotary=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 13)),
        seed=draw(st.integers(0, 2**31)),
    )


def run(case: Case, dtype: str = "float32"):
    """(weights, x, cotangent, tokens, (y, statistics), gradient by weight, gradient by x) of the block."""
    graphdef, state = reference.build(functools.partial(case.make, dtype), seed=case.seed)
    if dtype != "float32":  # so that rounding is the block's own
        state = jax.tree.map(lambda a: a.astype(dtype).astype(jnp.float32), state)
    x, d, tokens = case.batch_of(dtype)

    def both(state, x):
        (y, stats), pull = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x, tokens), state, x)
        return (y, stats), pull((d.astype(y.dtype), jax.tree.map(jnp.zeros_like, stats)))

    out, (d_w, d_x) = reference.jit(both)(state, x)
    return reference.weights_of(state), x, d, tokens, out, reference.weights_of(d_w), d_x


def close(case: Case, wanted, y, d_w, d_x, error, tolerance: float) -> None:
    wanted_y, wanted_d_w, wanted_d_x = wanted
    assert error(y, wanted_y) < tolerance
    # Scaled by all gradients together: one that is all cancellation has no digits of its own.
    assert error((d_w, d_x), (wanted_d_w, wanted_d_x)) < tolerance


def overall(a, b) -> float:
    """max|a-b| / max|b| over all leaves together."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = [
        (np.asarray(u, np.float64), np.asarray(v, np.float64))
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    ]
    assert all(u.shape == v.shape and np.isfinite(u).all() for u, v in pairs)
    top = max(np.abs(v).max(initial=0) for _, v in pairs)
    return max(np.abs(u - v).max(initial=0) for u, v in pairs) / (top or 1.0)


def check_against_the_reference(case: Case, dtype: str) -> None:
    w, x, d, tokens, (y, stats), d_w, d_x = run(case, dtype)
    wanted_y, wanted_d_w, wanted_d_x, chosen, kept, valid = case.dense(
        w, *(a.astype(jnp.float32) for a in (x, d)), tokens
    )
    np.testing.assert_array_equal(stats.chosen_N, chosen.sum((0, 1)))
    np.testing.assert_array_equal(stats.kept_N, kept.sum((0, 1)))
    assert (
        float(stats.patches) == valid.sum()
        and float(stats.untouched) == (valid & ~kept.any(-1)).sum()
    )
    assert not np.asarray(y)[np.asarray(tokens.segments_BL) == 0].any()
    error = overall if dtype == "float32" else reference.norm_error
    if dtype == "float32" or np.abs(wanted_y).max() > 0:
        close(
            case,
            (wanted_y, wanted_d_w, wanted_d_x),
            y,
            d_w,
            d_x,
            error,
            1e-5 if dtype == "float32" else 1e-2,
        )
    # 5: the router learns wherever it decided anything.
    r = case.routing
    if r.n_experts > 1 and r.gate != "none" and kept.any() and dtype == "float32":
        for g in jax.tree.leaves(d_w["router"]):
            assert np.isfinite(g).all()
        assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(d_w["router"]))


def check_alone(case: Case) -> None:
    """3: a row in a batch, alone, and with more padding behind it, is the same."""
    graphdef, state = reference.build(case.make, seed=case.seed)
    x, _, tokens = case.batch_of()
    f = reference.jit(lambda x, tokens: nnx.merge(graphdef, state)(x, tokens)[0])
    y, last = f(x, tokens), case.batch - 1
    alone = f(x[last:], jax.tree.map(lambda a: a[last:], tokens))
    assert reference.error(y[last:], alone) < 1e-5
    more = jnp.pad(x, ((0, 0), (0, 7), (0, 0)), constant_values=3.0)
    padded = f(more, tokens.padded(case.length + 7))
    assert (
        reference.error(padded[:, : case.length], y) < 1e-5
        and not np.asarray(padded)[:, case.length :].any()
    )


def check_equivalence(case: Case) -> None:
    """1: with K=N and C=M the dense block with the merged weights; gradients where the gate is 'none'."""
    graphdef, state = reference.build(case.make, seed=case.seed)
    if case.routing.gate != "none":
        for name in ("kernel", "bias"):
            if getattr(state["router"], name, None) is not None:
                state["router"][name] = jax.tree.map(jnp.zeros_like, state["router"][name])
    x, d, tokens = case.batch_of()
    ok = (tokens.segments_BL > 0)[..., None]
    dense_def, dense_state = nnx.split(case.make(dense=True))

    # The dense block says something at padding, where the union says nothing.
    def dense(w, x):
        return jnp.where(
            ok, nnx.merge(dense_def, fill(dense_state, reference.merge(w)))(x, tokens)[0], 0
        )

    ours = lambda w, x: nnx.merge(graphdef, fill(state, w))(x, tokens)[0]  # noqa: E731
    w = reference.weights_of(state)

    @reference.jit
    def both(w, x):
        (y, pull), (wanted, wanted_pull) = jax.vjp(ours, w, x), jax.vjp(dense, w, x)
        return (y, *pull(d)), (wanted, *wanted_pull(d))

    (y, *grads), (wanted, *wanted_grads) = both(w, x)
    assert reference.error(y, wanted) < 1e-5
    if case.routing.gate == "none":
        assert overall(grads, wanted_grads) < 1e-5


def fill(state: nnx.State, w: dict) -> nnx.State:
    state = jax.tree.map(lambda a: a, state)
    nnx.replace_by_pure_dict(state, w)
    return state


def check_causality(case: Case) -> None:
    """2: changing token t moves no output before it, bit for bit."""
    case = case._replace(
        causal=True, routing=dataclasses.replace(case.routing, unit="patch", priority="position")
    )
    graphdef, state = reference.build(case.make, seed=case.seed)
    x, other, tokens = case.batch_of()
    f = reference.jit(lambda x: nnx.merge(graphdef, state)(x, tokens)[0])
    y = np.asarray(f(x))
    for t in range(case.length):
        np.testing.assert_array_equal(np.asarray(f(x.at[:, t].set(other[:, t])))[:, :t], y[:, :t])


FEW, MANY = 4, 10


@examples(max_examples=FEW)
@given(case=cases(), dtype=st.sampled_from(["float32", "float32", "bfloat16"]))
def test_value_gradient_and_counts(case, dtype):
    check_against_the_reference(case, dtype)


@examples(max_examples=FEW)
@given(case=cases())
def test_independence(case):
    check_alone(case)


@examples(max_examples=FEW)
@given(case=cases(everyone=True))
def test_equivalence(case):
    check_equivalence(case)


@examples(max_examples=FEW)
@given(case=cases())
def test_causality(case):
    check_causality(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", ["reference float32", "reference bfloat16", "alone", "equivalence", "causality"]
)
def test_many(check):
    """The same, many times."""
    checks = {
        "reference float32": (
            cases(),
            functools.partial(check_against_the_reference, dtype="float32"),
        ),
        "reference bfloat16": (
            cases(),
            functools.partial(check_against_the_reference, dtype="bfloat16"),
        ),
        "alone": (cases(), check_alone),
        "equivalence": (cases(everyone=True), check_equivalence),
        "causality": (cases(), check_causality),
    }
    strategy, body = checks[check]
    examples(max_examples=MANY)(given(strategy)(lambda case: body(case)))()
