"""Loss-free balancing: a bias that the load moves, that only chooses, and that training and decoding share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from small_models import MODEL, batch, program

from uoe_jax import RoutingConfig, UoME
from uoe_jax.config import from_dict
from uoe_jax.moe import routing


def test_the_bias_evens_out_the_load():
    """Every patch prefers experts 0 and 1; after enough steps all experts are chosen alike."""
    r = RoutingConfig(n_experts=4, k=2, capacity_factor=2.0, bias_rate=0.004)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 64, 4)) + np.array([2.0, 1.0, 0.0, 0.0]), jnp.float32)
    valid, bias = jnp.ones((4, 64), bool), jnp.zeros(4)
    step = jax.jit(lambda b: reference.selected(logits, valid, r, load_bias_N=b))
    first = None
    for _ in range(250):
        selection, stats = step(bias)
        first = stats.chosen_N if first is None else first
        bias = routing.rebalanced(bias, stats.chosen_N, r.bias_rate)
    assert first.max() > 1.5 * first.mean() and stats.chosen_N.max() < 1.1 * stats.chosen_N.mean()
    # It chooses and nothing else: a patch's weight for an expert is the same with and without it.
    plain, _ = step(jnp.zeros(4))
    for n in range(4):
        both = set(np.flatnonzero(plain.kept_BMN[0, :, n])) & set(
            np.flatnonzero(selection.kept_BMN[0, :, n])
        )
        slots = [
            {m: i for i, m in enumerate(np.asarray(s.slots_NRC[n, 0]))} for s in (plain, selection)
        ]
        for m in both:
            a, b = plain.weights_NRC[n, 0, slots[0][m]], selection.weights_NRC[n, 0, slots[1][m]]
            assert m == 0 or a == b  # slot 0 is also what empty slots hold


def test_no_gradient_reaches_the_bias():
    r = RoutingConfig(n_experts=4, k=2, bias_rate=0.1)
    graphdef, state = nnx.split(UoME(8, 16, r, causal=True, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    grads = jax.grad(lambda s: nnx.merge(graphdef, s)(x)[0].sum())(state)
    grads = nnx.to_pure_dict(grads)["router"]
    assert not np.asarray(grads["load_bias"]).any() and np.asarray(grads["kernel"]).any()


def test_the_train_step_moves_it_by_the_load_of_the_whole_batch():
    balanced = {
        "n_experts": 4,
        "k": 2,
        "capacity_window": 16,
        "bias_rate": 0.25,
        "balance_weight": 0.0,
    }
    values = {"model": {**MODEL, "uome": balanced}, "train": {"batch_size": 4}, "mesh": {"data": 1}}
    moved = []
    for parts in (1, 2):
        p = program(from_dict({**values, "train": {"batch_size": 4, "accumulation": parts}}))
        state, metrics = p.train_step(p.init(jax.random.key(0)), batch())
        bias = np.asarray(state.params["layers"]["mlp"]["router"]["load_bias"])
        chosen = np.asarray(metrics["sums"].routing["uome"].chosen_N)
        np.testing.assert_array_equal(bias, 0.25 * np.sign(chosen.mean(-1, keepdims=True) - chosen))
        moved.append(bias)
        assert "load_bias" not in state.params["layers"]["attention"]["router"]
    np.testing.assert_array_equal(*moved)
