"""Selection by whole sequences, and hierarchically: sequences choose experts, their patches compete for the slots."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from uoe_jax import RoutingConfig, UoME
from uoe_jax.config import from_dict
from uoe_jax.errors import ConfigError
from uoe_jax.layers.common import Tokens

B, M, N, K = 3, 10, 4, 2
VALID = np.array([[1] * 10, [1] * 7 + [0] * 3, [0] * 10], bool)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept_by_hand(r, sequence, patches):
    """bool [B,M,N]: sequence by sequence, expert by expert."""
    kept = np.zeros((B, M, N), bool)
    for b in range(B):
        here = np.flatnonzero(VALID[b])
        for e in np.argsort(-softmax(sequence[b]), kind="stable")[: r.k]:
            if (
                r.unit == "sequence" and r.priority == "position"
            ):  # windows of capacity_window patches
                for start in range(0, M, r.capacity_window):
                    window = [i for i in here if start <= i < start + r.capacity_window]
                    kept[b, window[: r.window_capacity()], e] = True
                continue
            score = softmax(patches[b])[:, e] if r.unit == "hierarchical" else np.ones(M)
            best = sorted(here, key=lambda i: (-score[i], i))
            kept[b, best[: r.window_capacity(len(here)) if len(here) else 0], e] = True
    return kept


@pytest.mark.parametrize("factor", [0.35, 1.0])
@pytest.mark.parametrize(
    "unit,priority", [("sequence", "position"), ("sequence", "score"), ("hierarchical", "score")]
)
def test_who_is_kept(unit, priority, factor):
    r = RoutingConfig(
        n_experts=N, k=K, unit=unit, priority=priority, capacity_factor=factor, capacity_window=6
    )
    rng = np.random.default_rng(0)
    sequence, patches = (
        rng.normal(size=(B, N)).astype(np.float32),
        rng.normal(size=(B, M, N)).astype(np.float32),
    )
    own = None if unit == "sequence" else jnp.asarray(patches)
    selection, stats = reference.selected(own, jnp.asarray(VALID), r, jnp.asarray(sequence))
    kept = kept_by_hand(r, sequence, patches)
    np.testing.assert_array_equal(selection.kept_BMN, kept)
    np.testing.assert_array_equal(stats.kept_N, kept.sum((0, 1)))
    assert (
        float(stats.chosen_N.sum()) == K * VALID.sum()
    )  # every valid patch comes to the K experts of its sequence
    if factor == 1.0:
        assert kept.sum() == K * VALID.sum()  # dropless
    gate = 2 / (1 + np.exp(-sequence[:, None])) * np.ones((1, M, 1))
    if unit == "hierarchical":
        gate = gate * 2 / (1 + np.exp(-patches))
    for n in range(N):
        for b in range(B):
            filled = int(kept[b, :, n].sum())
            where = np.flatnonzero(kept[b, :, n])
            np.testing.assert_array_equal(selection.slots_NRC[n, b, :filled], where)
            np.testing.assert_allclose(
                selection.weights_NRC[n, b, :filled], gate[b, where, n], rtol=1e-5
            )
            assert not np.asarray(selection.weights_NRC)[n, b, filled:].any()


@pytest.mark.parametrize("unit", ["sequence", "hierarchical"])
def test_value_and_gradient(unit):
    """A UoME against a sum over experts of gate * MLP, masked by hand; both routers learn; padding changes nothing."""
    d, f, p = 8, 16, 2
    r = RoutingConfig(
        n_experts=N,
        k=K,
        unit=unit,
        priority="score",
        capacity_factor=0.6,
        patch_size=p,
        router_bias=True,
    )
    graphdef, state = nnx.split(UoME(d, f, r, rngs=nnx.Rngs(0)))
    w = nnx.to_pure_dict(state)
    x, cotangent = reference.normal(1, B, M * p, d), reference.normal(2, B, M * p, d)
    segments = jnp.asarray(np.repeat(VALID, p, axis=1).astype(np.int32))
    tokens = Tokens(segments, jnp.zeros_like(segments))

    def ours(w, x):
        s = jax.tree.map(lambda a: a, state)
        nnx.replace_by_pure_dict(s, w)
        return (nnx.merge(graphdef, s)(x, tokens)[0] * cotangent).sum()

    def logits_of(w, x):
        ok = (segments > 0).astype(jnp.float32)[..., None]
        mean = (x * ok).sum(1) / jnp.maximum(ok.sum(1), 1)
        sequence = mean @ w["router"]["sequence_kernel"] + w["router"]["sequence_bias"][None]
        patches = jnp.zeros((B, M, N))
        if unit == "hierarchical":
            patches = (
                x.reshape(B, M, p, d).mean(2) @ w["router"]["kernel"]
                + w["router"]["bias"][None, None]
            )
        return sequence, patches

    kept = jnp.asarray(np.repeat(kept_by_hand(r, *map(np.asarray, logits_of(w, x))), p, axis=1))

    def wanted(w, x):
        sequence, patches = logits_of(w, x)
        gate = 2 * jax.nn.sigmoid(sequence)[:, None] * jnp.ones((1, M, 1))
        if unit == "hierarchical":
            gate = gate * 2 * jax.nn.sigmoid(patches)
        weight = jnp.where(kept, jnp.repeat(gate, p, axis=1), 0)
        hidden = jax.nn.gelu(jnp.einsum("bld,ndf->nblf", x, w["w_up"]), approximate=False)
        return (jnp.einsum("nblf,nfd,bln->bld", hidden, w["w_down"], weight) * cotangent).sum()

    value, (d_w, d_x) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(w, x)
    wanted_value, (wanted_d_w, wanted_d_x) = jax.jit(jax.value_and_grad(wanted, argnums=(0, 1)))(
        w, x
    )
    np.testing.assert_allclose(value, wanted_value, rtol=1e-4)
    assert reference.error(d_x, wanted_d_x) < 1e-5
    for (path, a), b in zip(
        jax.tree.leaves_with_path(d_w), jax.tree.leaves(wanted_d_w), strict=True
    ):
        np.testing.assert_allclose(
            a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())), err_msg=jax.tree_util.keystr(path)
        )
        assert np.abs(a).max() > 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("unit", ["sequence", "hierarchical"])
def test_refused_where_it_would_see_the_future(unit):
    with pytest.raises(ConfigError, match=f"uome.unit='{unit}'.*not known yet"):
        from_dict({"model": {"uome": {"unit": unit}}})
    with pytest.raises(ValueError, match="later patches"):
        UoME(8, 16, RoutingConfig(unit=unit), causal=True, rngs=nnx.Rngs(0))
