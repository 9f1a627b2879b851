"""What training draws: dropout and router noise from the row's own key, and the bound on sequences per expert."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow
from small_models import MODEL, batch

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.config import ModelConfig, from_dict
from uoe_jax.distributed.mesh import make_mesh, put_batch
from uoe_jax.errors import ConfigError
from uoe_jax.layers.common import Tokens, dropout, tokens_like
from uoe_jax.models.decoder import Transformer
from uoe_jax.moe import routing
from uoe_jax.train.step import build, row_keys

B, L, D, N = 8, 12, 16, 4
KEYS = jax.random.split(jax.random.key(5), B)


# --- dropout and noise ------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_draws_by_row():
    x = jnp.ones((B, 50, 40))
    y = dropout(x, 0.25, KEYS)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.02
    np.testing.assert_array_equal(dropout(x[::-1], 0.25, KEYS[::-1])[::-1], y)
    assert (y[0] != y[1]).any()
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, KEYS) is x


def language_model(**changes):
    r = RoutingConfig(n_experts=N, k=2, capacity_window=6)
    values = (
        dict(
            vocab_size=11,
            d_model=D,
            n_layers=2,
            n_heads=4,
            d_hidden=32,
            context_length=L,
            smha=r,
            uome=r,
        )
        | changes
    )
    config = ModelConfig(**values)
    graphdef, state = reference.build(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    f = reference.jit(lambda tokens, keys: nnx.merge(graphdef, state)(tokens, keys_B=keys))
    return config, f


DRAWING = {
    "dropout": dict(dropout=0.2),
    "attention dropout": dict(attention_dropout=0.2),
    "attention dropout, dense": dict(attention_dropout=0.2, attention="dense", n_kv_heads=2),
    "router noise": dict(
        smha=RoutingConfig(n_experts=N, k=2, router_noise=1.0),
        uome=RoutingConfig(n_experts=N, k=2, router_noise=1.0),
    ),
}


@pytest.mark.parametrize("name", DRAWING)
def test_a_row_draws_from_its_own_key(name):
    _, f = language_model(**DRAWING[name])
    row = np.random.default_rng(0).integers(0, 11, (1, L), np.int32)
    tokens = np.repeat(row, B, axis=0)
    y, _ = f(tokens, KEYS)
    assert len({np.asarray(r).tobytes() for r in y}) == B  # the same row, another key
    alone, _ = f(tokens[3:5], KEYS[3:5])
    assert reference.error(alone, y[3:5]) < 1e-6  # its place in the batch does not matter
    evaluated, _ = f(tokens, None)
    assert len({np.asarray(r).tobytes() for r in evaluated}) == 1
    assert np.abs(evaluated - y).max() > 1e-3


def test_layers_and_places_draw_differently():
    """No mask of dropout is that of another layer or of another place in a layer."""

    class Ones(nnx.Module):
        """A block whose output is dropped from, visibly."""

        def __call__(self, x, tokens=None):
            return jnp.ones_like(x), None

    config, _ = language_model(
        dropout=0.5, attention="dense", mlp="dense", remat="none", n_layers=2
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.layers.attention, model.layers.mlp = Ones(), Ones()
    x = jnp.zeros((2, L, D))
    tokens = tokens_like(x)._replace(keys_B=KEYS[:2])
    # Four masks of 0 or 2 are added: independent ones sum to 0, 2, 4, 6 and 8 in the shares 1, 4, 6, 4 and 1 of 16.
    total = np.asarray(model.run(x, tokens)[0])
    shares = [(total == value).mean() for value in (0, 2, 4, 6, 8)]
    np.testing.assert_allclose(shares, np.array([1, 4, 6, 4, 1]) / 16, atol=0.07)
    assert (total[0] != total[1]).any()


def test_router_noise_chooses_and_does_not_weigh():
    r = RoutingConfig(n_experts=N, k=2, capacity_factor=2.0, router_noise=1.0)
    logits, valid = reference.normal(0, B, L, N), jnp.ones((B, L), bool)
    quiet, _ = reference.selected(logits, valid, r)
    noisy, _ = reference.selected(logits, valid, r, keys_B=KEYS)
    both = np.asarray(quiet.kept_BMN & noisy.kept_BMN)
    assert 0.2 < (np.asarray(quiet.kept_BMN) & both).sum() / np.asarray(quiet.kept_BMN).sum() < 0.95
    weight = 2 / (1 + np.exp(-np.asarray(logits)))
    for s in (quiet, noisy):
        for n, b in np.ndindex(N, B):
            filled = np.asarray(s.valid_NRC[n, b])
            np.testing.assert_allclose(
                s.weights_NRC[n, b][filled], weight[b, s.slots_NRC[n, b][filled], n], rtol=1e-6
            )


def test_where_sequences_choose_the_noise_is_the_sequence_s():
    """All patches of a sequence follow it, in training too."""
    r = RoutingConfig(n_experts=N, k=2, unit="sequence", capacity_factor=1.0, router_noise=2.0)
    valid, logits = jnp.ones((B, L), bool), reference.normal(0, B, N)
    noisy, _ = reference.selected(None, valid, r, logits, keys_B=KEYS)
    quiet, _ = reference.selected(None, valid, r, logits)
    kept = np.asarray(noisy.kept_BMN)
    assert (kept == kept[:, :1]).all() and (kept[:, 0].sum(-1) == 2).all()
    assert (kept != np.asarray(quiet.kept_BMN)).any()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["gather", "project"])
def test_attention_dropout_against_masks_by_hand(order):
    """Two experts of one head take everything: softmax weights, some of them zeroed, times the values."""
    r = RoutingConfig(n_experts=2, k=2, gate="none", order=order)
    block = SMHA(8, 2, r, causal=True, drop_rate=0.5, rngs=nnx.Rngs(0))
    x = reference.normal(0, 2, 6, 8)
    tokens = tokens_like(x)._replace(keys_B=KEYS[:2])
    y, _ = block(x, tokens)
    wanted = jnp.zeros_like(x)
    for e in range(2):
        q, k, v = (
            jnp.einsum("bld,dk->blk", x, getattr(block, f"w_{a}")[...][e, :, 0]) for a in "qkv"
        )
        s = jnp.where(
            jnp.tril(jnp.ones((6, 6), bool))[None],
            jnp.einsum("btk,bsk->bts", q, k) / 4**0.5,
            -jnp.inf,
        )
        # The key of the row, for the experts (1), for this expert, for its one key head (0), for the one tile (0).
        keys = jax.vmap(lambda key: functools.reduce(jax.random.fold_in, (1, e, 0, 0), key))(
            KEYS[:2]
        )
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6, 6)))(keys)
        wanted = (
            wanted
            + jnp.where(keep, 2 * jax.nn.softmax(s, axis=-1), 0) @ v @ block.w_o[...][e, 0][None]
        )
    assert reference.error(y, wanted) < 1e-5
    assert np.abs(y - block(x)[0]).max() > 0.05


NOISY = dict(n_experts=4, k=2, capacity_window=16, router_noise=0.5)
# Whole sequences choose; each expert takes one of two consecutive rows.
BOUNDED = dict(
    n_experts=4,
    k=2,
    unit="sequence",
    priority="score",
    sequence_capacity_factor=1.0,
    sequence_group=2,
)
TRAINED = {
    "everything random": dict(dropout=0.1, attention_dropout=0.1, smha=NOISY, uome=NOISY),
    "bounded sequences": dict(
        causal=False, smha=BOUNDED, uome=BOUNDED | dict(unit="hierarchical", capacity_factor=0.5)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_draws_the_same_on_every_mesh(name):
    """Two steps on one device, on eight, and in two microbatches; noise, dropout and bounds are of training only."""

    def losses(model: dict, sizes: dict, parts: int) -> tuple[list[float], float]:
        values = {
            "model": {**MODEL, **model},
            "train": {"batch_size": 8, "accumulation": parts},
            "mesh": sizes,
        }
        config = from_dict(values)
        mesh = make_mesh(config.mesh, jax.devices()[: 1 if sizes == ONE else 8])
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            state, rows, found = program.init(jax.random.key(0)), put_batch(mesh, batch(rows=8)), []
            evaluated = program.eval_step(state.params, rows)
            for _ in range(2):
                state, metrics = program.train_step(state, rows)
                found.append(float(metrics["sums"].nll) / float(metrics["sums"].tokens))
        return found, float(evaluated.nll) / float(evaluated.tokens)

    ONE = dict(data=1)
    one, evaluated = losses(TRAINED[name], ONE, 1)
    for sizes, parts in ((dict(data=2, fsdp=2, expert=2), 1), (ONE, 2)):
        np.testing.assert_allclose(losses(TRAINED[name], sizes, parts)[0], one, rtol=1e-5)
    # The first step's loss is that of the same parameters: only what training draws and bounds makes it another.
    assert abs(one[0] / evaluated - 1) > 1e-3


def test_every_row_of_every_step_has_its_own_key():
    config = from_dict({"model": MODEL, "train": {"batch_size": 4}})
    first, second = (jax.random.key_data(row_keys(config, jnp.int32(step))) for step in (0, 1))
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 8


# --- sequences per expert ---------------------------------------------------------------------------------------

BOUND = RoutingConfig(
    n_experts=N,
    k=2,
    unit="sequence",
    priority="score",
    capacity_factor=0.75,
    sequence_capacity_factor=1.0,
    sequence_group=4,
)


def bound_by_hand(
    chosen_BN: np.ndarray, scores_BN: np.ndarray, group: int, capacity: int
) -> np.ndarray:
    """bool [B,N]: who is taken, group by group and expert by expert."""
    taken = np.zeros_like(chosen_BN)
    for start in range(0, len(chosen_BN), group):
        for e in range(chosen_BN.shape[1]):
            asking = [b for b in range(start, start + group) if chosen_BN[b, e]]
            taken[sorted(asking, key=lambda b: (-scores_BN[b, e], b))[:capacity], e] = True
    return taken


@pytest.mark.parametrize("group, capacity", [(1, 1), (2, 1), (4, 2), (8, 3), (8, 8)])
def test_who_is_taken(group, capacity):
    rng = np.random.default_rng(group)
    chosen, scores = rng.random((B, N)) < 0.6, rng.random((B, N)).astype(np.float32)
    sequence_NR, row_of_BN = routing.bound_sequences(
        jnp.asarray(chosen), jnp.asarray(scores), group, capacity
    )
    r = capacity * B // group
    assert sequence_NR.shape == (N, r)
    taken = bound_by_hand(chosen, scores, group, capacity)
    np.testing.assert_array_equal(np.asarray(row_of_BN) < r, taken)
    for b, e in np.argwhere(taken):
        assert sequence_NR[e, row_of_BN[b, e]] == b
        assert (
            row_of_BN[b, e] // capacity == b // group
        )  # a group's sequences lie in the group's rows


def test_the_number_of_sequences_is_exact():
    for factor, wanted in ((1.0, 2), (0.01, 1), (1.1, 3), (4.0, 4), (0.5, 1)):
        assert (
            dataclasses.replace(BOUND, sequence_capacity_factor=factor).sequence_capacity()
            == wanted
        )


@pytest.mark.parametrize(
    "kind, order, dispatch",
    [
        slow("uome", "gather", "inverse"),
        slow("smha", "project", "scatter"),
        slow("smha", "gather", "inverse"),
    ],
)
@pytest.mark.parametrize("unit", ["sequence", slow("hierarchical")])
def test_bounded_blocks(kind, order, dispatch, unit):
    """In training, values and gradients of the reference in which a sequence too many is not taken; evaluation takes all."""
    r = dataclasses.replace(BOUND, unit=unit, order=order, dispatch=dispatch, patch_size=2)
    make = (
        (lambda: UoME(D, 32, r, rngs=nnx.Rngs(0)))
        if kind == "uome"
        else (lambda: SMHA(D, N, r, rngs=nnx.Rngs(0)))
    )
    graphdef, state = reference.build(make)
    w = reference.weights_of(state)
    x, d = reference.normal(1, B, L, D), reference.normal(2, B, L, D)
    segments = jnp.asarray(
        (np.arange(L)[None] < np.array([12, 12, 7, 12, 0, 12, 3, 12])[:, None]).astype(np.int32)
    )
    tokens = Tokens(segments, jnp.broadcast_to(jnp.arange(L), (B, L)), keys_B=KEYS)

    chosen, kept, scores = [], [], []
    for row in range(B):
        patch = (
            None
            if unit == "sequence"
            else reference.router_logits(w, x[row], segments[row], 2, False)
        )
        whole = reference.sequence_logits(w, x[row], segments[row])
        c, k = reference.select(patch, np.asarray(segments[row]).reshape(-1, 2).any(1), r, whole)
        chosen.append(c), kept.append(k), scores.append(reference.softmax(whole))
    chosen, kept, scores = map(np.stack, (chosen, kept, scores))
    taken = bound_by_hand(chosen.any(1), scores, r.sequence_group, r.sequence_capacity())
    assert 0 < taken.sum() < chosen.any(1).sum()

    def wanted(w, x, kept):
        one = functools.partial(reference.union, w, r=r, causal=False)
        return jax.vmap(lambda x, s, c, k: one(x, s, None, c, k))(x, segments, chosen, kept)

    @reference.jit
    def both(w, x):
        def ours(w, x):
            s = jax.tree.map(lambda a: a, state)
            nnx.replace_by_pure_dict(s, w)
            return nnx.merge(graphdef, s)(x, tokens)

        (y, pull, stats), (z, back) = (
            jax.vjp(ours, w, x, has_aux=True),
            jax.vjp(lambda w, x: wanted(w, x, kept & taken[:, None]), w, x),
        )
        return (y, pull(d)), (z, back(d)), stats

    got, reference_, stats = both(w, x)
    assert reference.error(got, reference_) < 1e-5
    np.testing.assert_array_equal(stats.kept_N, (kept & taken[:, None]).sum((0, 1)))
    np.testing.assert_array_equal(stats.chosen_N, chosen.sum((0, 1)))
    evaluated, _ = nnx.merge(graphdef, state)(x, tokens._replace(keys_B=None))
    assert reference.error(evaluated, wanted(w, x, kept)) < 1e-5


@pytest.mark.slow
def test_groups_do_not_see_each_other_and_must_fit():
    graphdef, state = reference.build(lambda: UoME(D, 32, BOUND, rngs=nnx.Rngs(0)))
    x = reference.normal(1, B, L, D)
    f = lambda x: nnx.merge(graphdef, state)(x, tokens_like(x)._replace(keys_B=KEYS[: len(x)]))[0]  # noqa: E731
    np.testing.assert_allclose(f(x.at[4:].set(1.0))[:4], f(x)[:4], rtol=1e-6)
    with pytest.raises(
        ValueError, match="sequence_group=4 must divide the 6 rows of the batch: 1, 2, 3, 6"
    ):
        f(x[:6])
    bounded = {"unit": "sequence", "priority": "score", "sequence_capacity_factor": 1.0}
    with pytest.raises(
        ConfigError,
        match="uome.sequence_group=8: must divide the 12 rows of one device's microbatch: 1, 2, 3, 4, 6, 12",
    ):
        from_dict(
            {
                "model": {"causal": False, "vocab_size": 9, "uome": bounded},
                "train": {"batch_size": 12},
            }
        )
