"""Causality of the model, bit for bit, and decoding against the full pass."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow
from small_decoders import CONTEXT, D, F, H, N, V, build, draw

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.config import ConfigError, ModelConfig, check_model


def model_config(smha: RoutingConfig, uome: RoutingConfig, **changes) -> ModelConfig:
    base = dict(vocab_size=V, d_model=D, n_layers=2, n_heads=H, d_hidden=F, context_length=CONTEXT)
    config = ModelConfig(**base | changes, smha=smha, uome=uome)
    check_model(config)
    return config


def route(
    patch_size: int = 1, factor: float = 0.75, window: int = 6, k: int = 2, n: int = N, **changes
) -> RoutingConfig:
    return RoutingConfig(
        n_experts=n,
        k=k,
        capacity_factor=factor,
        capacity_window=window,
        patch_size=patch_size,
        **changes,
    )


# --- causality --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "p, factor, dtype, backend",
    [
        (1, 0.5, "float32", "inverse"), (4, 0.75, "bfloat16", "scatter"), (16, 1.0, "float32", "scatter"), (4, 2.0, "bfloat16", "inverse"),
        *(
            slow(p, factor, dtype, "auto")
            for p in (1, 4, 16) for factor in (0.5, 1.0, 2.0) for dtype in ("float32", "bfloat16")
        ),
    ],
)  # fmt: skip
def test_no_output_depends_on_a_later_token(p, factor, dtype, backend):
    window = {1: 5, 4: 4, 16: 2}[p]  # several windows in a row, the last one short
    routing = route(p, factor, window, dispatch=backend)
    full, _, _ = build(model_config(routing, routing, dtype=dtype, bias=True, activation="swiglu"))
    row = draw(0, 1, CONTEXT)
    wanted, stats = full(row)
    dropped = sum(float(s.chosen_N.sum() - s.kept_N.sum()) for s in stats.values())
    assert dropped > 0 or factor >= 1
    moved = 0
    for t in range(CONTEXT):
        changed = row.copy()
        changed[0, t] = (row[0, t] + 1) % V
        got = np.asarray(full(changed)[0])
        np.testing.assert_array_equal(got[0, :t], wanted[0, :t])
        assert (got[0, t] != np.asarray(wanted)[0, t]).any()
        moved += int((got[0, t + 1 :] != np.asarray(wanted)[0, t + 1 :]).any())
    assert moved > CONTEXT // 2  # and later outputs do depend on it


@pytest.mark.parametrize("section", ["smha", "uome"])
def test_what_could_see_the_future_is_refused(section):
    routings = {"smha": route(), "uome": route()} | {section: route(priority="score")}
    with pytest.raises(ConfigError, match=rf"config.model.{section}.priority.*causal"):
        model_config(**routings)
    assert model_config(**routings, causal=False)


@pytest.mark.parametrize("block, width", [(SMHA, H), (UoME, F)])
def test_a_block_alone_refuses_it_too(block, width):
    with pytest.raises(ValueError, match="priority='score' in a causal block"):
        nnx.eval_shape(
            lambda: block(D, width, route(priority="score"), causal=True, rngs=nnx.Rngs(0))
        )


# --- decoding ---------------------------------------------------------------------------------------------------

DECODING = {
    # Windows of 4 patches of 4 tokens and of 6 tokens: a row of 48 has three and eight of them.
    "smha P=4, uome P=1": dict(smha=route(4, window=4), uome=route(), bias=True, position="learned", norm="layernorm", qk_norm=True),
    "smha P=1, uome P=4, grouped": dict(
        smha=route(n=2, k=1, factor=0.8, gate="score", router_bias=True, bias_rate=0.1), uome=route(4, 0.5, 3, gate="normalized"),
        n_kv_heads=2, activation="swiglu", tie_embeddings=False,
    ),
    "dense, uome P=16": dict(smha=route(), uome=route(16, 0.5, 2), attention="dense", n_kv_heads=2, bias=True, qk_norm=True),
    "smha P=16, dense": dict(smha=route(16, 0.5, 2, k=3), uome=route(), mlp="dense", bias=True, position="none"),
    "dense, dense": dict(smha=route(), uome=route(), attention="dense", mlp="dense", bias=True, position="learned"),
    "no capacity bound": dict(smha=route(4, 2.0, 64, gate="straight_through"), uome=route(1, 4.0, 64, gate="none")),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [slow(name) if name == "no capacity bound" else name for name in DECODING]
)
def test_decoding_gives_the_full_pass(name):
    full, prefill, step = build(model_config(**DECODING[name]))
    # Prompts end at the end of a patch, of a window and of the padded prompt, inside a patch, and after one token.
    lengths = np.array([16, 13, 12, 7, 1], np.int32)
    rows = draw(1, len(lengths), CONTEXT)
    wanted, stats = full(rows)
    scale = np.abs(wanted).max()
    drops = [float(s.chosen_N.sum() - s.kept_N.sum()) for s in stats.values()]
    assert (min(drops) > 0) if stats and name != "no capacity bound" else not any(drops)
    got, cache = prefill(rows[:, :16], lengths)
    each = np.arange(len(lengths))
    for offset in range(CONTEXT - 16 + 1):
        at = lengths + offset
        np.testing.assert_allclose(
            got,
            np.asarray(wanted)[each, at - 1],
            rtol=0,
            atol=1e-5 * scale,
            err_msg=f"positions {at - 1}",
        )
        np.testing.assert_array_equal(cache.next_B, at)
        if offset < CONTEXT - 16:
            got, cache = step(rows[each, at], cache)


def test_a_row_decodes_alone():
    """Neither other rows of a decoding batch nor what follows a prompt changes anything."""
    _, prefill, step = build(model_config(**DECODING["smha P=4, uome P=1"]))
    rows, lengths = draw(1, 5, CONTEXT), np.array([16, 13, 12, 7, 1], np.int32)
    others = np.where(np.arange(5)[:, None] == 3, rows, draw(2, 5, CONTEXT))
    others[3, 7:16] = 0  # the padding of the prompt
    got, cache = prefill(rows[:, :16], lengths)
    same, other_cache = prefill(others[:, :16], lengths)
    np.testing.assert_array_equal(got[3], same[3])
    for t in range(7, 30):
        feed, other_feed = draw(t, 5), draw(100 + t, 5)
        other_feed[3] = feed[3]
        got, cache = step(feed, cache)
        same, other_cache = step(other_feed, other_cache)
        np.testing.assert_array_equal(got[3], same[3])
    moved = (np.asarray(got) != np.asarray(same)).any(axis=1)
    assert moved.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("length", [14, 3])
def test_a_prompt_whose_last_patch_is_not_full(length):
    """Prefilled as it is, not padded to a multiple of 4, and shorter than a patch."""
    _, prefill, step = build(model_config(**DECODING["smha P=4, uome P=1"]))
    row, n = draw(0, 1, 16), np.array([length], np.int32)
    got, cache = prefill(row[:, :length], n)
    wanted, wanted_cache = prefill(row, n)
    for t in range(6):
        assert reference.error(got, wanted) < 1e-6
        (got, cache), (wanted, wanted_cache) = (
            step(draw(t, 1), cache),
            step(draw(t, 1), wanted_cache),
        )
