"""Whole models of baselines: causality, decoding, independence, meshes, balance, refusals, accounting."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow
from small_decoders import CONTEXT, V, build, draw
from small_models import ONE, assert_same_training, compilers_count, sized, train_on

from uoe_jax import config as config_lib
from uoe_jax.compare import presets
from uoe_jax.compare.measure import drawn_batch
from uoe_jax.config import ModelConfig
from uoe_jax.config.baselines import SECTIONS
from uoe_jax.costs.flops import forward_flops
from uoe_jax.costs.memory import idle_parameters, kept_bytes
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import ConfigError
from uoe_jax.layers import tiles
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.count import parameters
from uoe_jax.models.decoder import Transformer
from uoe_jax.train import step
from uoe_jax.train.step import accumulated_gradients, adapted, functional
from uoe_jax.train.step import build as build_program
from uoe_jax.train.task import task_of

MOE = dict(n_experts=4, k=2, capacity_factor=0.75, capacity_window=6)
CAUSAL = {
    "mla, deepseek_moe as V3": dict(
        attention="mla", mlp="deepseek_moe", mla=dict(q_rank=8, kv_rank=8, d_rope=4), activation="swiglu",
        moe={**MOE, "n_shared": 1, "d_expert": 8, "score": "sigmoid", "scale": 2.5, "bias_rate": 0.01},
    ),
    "moh, token_choice": dict(attention="moh", mlp="token_choice", moh=dict(n_shared=1, k=2), moe=MOE, bias=True),
    "mla, xmoe": dict(attention="mla", mlp="xmoe", mla=dict(q_rank=0, kv_rank=8), moe={**MOE, "threshold": 0.6}, bias=True),
    "dense, skywork_moe": dict(attention="dense", mlp="skywork_moe", moe={**MOE, "d_expert": 16, "adaptive_rate": 0.5, "logit_scale": 2.0}),
}  # fmt: skip
SMALL = dict(vocab_size=V, d_model=16, n_layers=2, n_heads=4, d_hidden=32, context_length=CONTEXT)


UNIONS = {name: dict(n_experts=4, k=2) for name in ("smha", "uome")}


def model_of(**changes) -> ModelConfig:
    return config_lib.from_dict({"model": {**SMALL, **UNIONS, **changes}}).model


# --- contract 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name, dtype):
    full, _, _ = build(model_of(**CAUSAL[name], dtype=dtype))
    row = draw(0, 1, CONTEXT)
    wanted, stats = full(row)
    wanted = np.asarray(wanted)
    assert (
        sum(float(s.chosen_N.sum() - s.kept_N.sum()) for s in stats.values()) > 0
    )  # capacity is felt
    moved = 0
    for t in range(0, CONTEXT, 3):
        changed = row.copy()
        changed[0, t] = (row[0, t] + 1) % V
        got = np.asarray(full(changed)[0])
        np.testing.assert_array_equal(got[0, :t], wanted[0, :t])
        assert (got[0, t] != wanted[0, t]).any()
        moved += int((got[0, t + 1 :] != wanted[0, t + 1 :]).any())
    assert moved > CONTEXT // 3 // 2


@pytest.mark.parametrize("name", CAUSAL)
def test_decoding_gives_the_full_pass(name):
    full, prefill, step = build(model_of(**CAUSAL[name]))
    rows, lengths = draw(1, 2, CONTEXT), np.array([5, 13], np.int32)
    wanted = np.asarray(full(rows)[0])
    prompt = np.where(np.arange(16)[None] < lengths[:, None], rows[:, :16], 0)
    logits, cache = prefill(prompt, lengths)
    assert reference.error(logits, wanted[[0, 1], lengths - 1]) < 1e-5
    for i in range(CONTEXT - lengths.max()):  # past several capacity windows
        logits, cache = step(rows[[0, 1], lengths + i], cache)
        assert reference.error(logits, wanted[[0, 1], lengths + i]) < 2e-5, i


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(attention="mosa"), "model.attention='mosa'"),
        (dict(attention="performer"), "model.attention='performer'"),
        (dict(mlp="expert_choice"), "model.mlp='expert_choice'"),
        (dict(mlp="token_choice", moe=dict(n_experts=2, k=3)), "model.moe.k=3"),
        (dict(mlp="token_choice", moe=dict(k=3)), "model.moe.d_expert=0"),
        (dict(attention="moh", moh=dict(n_shared=3, k=2)), "model.moh.k=2"),
        (dict(attention="moh", moh=dict(n_shared=1, k=1)), "model.moh.k=1"),
        (dict(mlp="skywork_moe", moe=dict(k=1)), "model.moe.k=1"),
        (dict(mlp="deepseek_moe", moe=dict(k=1, score="sigmoid")), "model.moe.k=1"),
        (dict(attention="mla", mla=dict(d_rope=3)), "model.mla.d_rope=3"),
        (dict(attention="mla", qk_norm=True), "model.qk_norm=True"),
        (
            dict(attention="nystromformer", causal=False, nystromformer=dict(kernel=4)),
            "nystromformer.kernel=4",
        ),
        (
            dict(attention="long_short", causal=False, long_short=dict(window=5)),
            "long_short.window=5",
        ),
        (dict(attention="linformer", causal=False, attention_dropout=0.1), "attention_dropout=0.1"),
    ],
)
def test_what_cannot_be_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        model_of(**changes)


# --- contract 3 -------------------------------------------------------------------------------------------------

EFFICIENT = ("linformer", "nystromformer", "performer", "reformer", "long_short")
SIZES = dict(
    linformer=dict(rank=8), nystromformer=dict(landmarks=6, kernel=5), performer=dict(features=8), reformer=dict(chunk=8),
    long_short=dict(window=8, rank=4),
)  # fmt: skip
ENCODERS = {
    **{name: {"attention": name, "mlp": "dense", name: SIZES[name]} for name in EFFICIENT},
    "mosa, expert_choice": dict(
        attention="mosa", mlp="expert_choice", moe={**MOE, "capacity_factor": 1.0}
    ),
    "moh, skywork_moe": dict(attention="moh", mlp="skywork_moe", moe=MOE),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_and_batch_mates_change_nothing(name):
    c = model_of(**ENCODERS[name], causal=False, task="classify")
    graphdef, state = reference.build(lambda: Classifier(c, rngs=nnx.Rngs(0)))
    f = reference.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)[0])
    rows = draw(2, 3, 24)
    short = np.arange(24)[None] < np.array([24, 24, 17])[:, None]
    wanted = f(state, rows, short.astype(np.int32))
    longer = np.pad(rows, ((0, 0), (0, 8)), constant_values=3)
    assert (
        reference.error(f(state, longer, np.pad(short, ((0, 0), (0, 8))).astype(np.int32)), wanted)
        < 1e-5
    )
    alone = f(state, rows[2:], short[2:].astype(np.int32))
    assert reference.error(alone, wanted[2:]) < 1e-5
    assert reference.error(f(state, rows[2:, :17], None), wanted[2:]) < 1e-5


def test_documents_of_a_row_do_not_meet():
    full, _, _ = build(model_of(**{**CAUSAL["mla, xmoe"], "moe": {**MOE, "capacity_factor": 4.0}}))
    row = draw(4, 1, CONTEXT)
    segments = np.where(np.arange(CONTEXT) < 20, 1, 2)[None].astype(np.int32)
    positions = np.where(np.arange(CONTEXT) < 20, np.arange(CONTEXT), np.arange(CONTEXT) - 20)[
        None
    ].astype(np.int32)
    wanted = np.asarray(full(row, segments, positions)[0])
    changed = row.copy()
    changed[0, :20] = (row[0, :20] + 1) % V
    np.testing.assert_array_equal(
        np.asarray(full(changed, segments, positions)[0])[0, 20:], wanted[0, 20:]
    )


# --- contracts 5, 6, 7 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_every_router_learns(name):
    c = model_of(**CAUSAL[name])
    graphdef, state = nnx.split(Transformer(c, rngs=nnx.Rngs(0)))
    tokens = draw(3, 2, CONTEXT)

    def loss(state):
        return nnx.merge(graphdef, state).nll(tokens, np.roll(tokens, -1, axis=1))[0].mean()

    grads = dict(nnx.to_flat_state(reference.jit(jax.grad(loss))(state)))
    for path, value in grads.items():
        untrained = path[-1] in ("load_bias", "balance_weight")
        assert np.isfinite(value.value).all(), path
        most = np.abs(value.value).max()  # rounding alone is 1e-8
        assert most == 0 if untrained else most > 1e-5, (path, most)


def test_float16_sums_millions_of_targets(monkeypatch):
    """Of a mean over so many, a token's share is below float16's least number: the loss is scaled for it, the gradient is not."""
    millions = jnp.float32(1 << 22)
    monkeypatch.setattr(
        step,
        "task_of",
        lambda config: task_of(config)._replace(counts=lambda batch: (millions, millions)),
    )

    def gradient(dtype):
        c = config_lib.from_dict(
            {
                "model": {**SMALL, "attention": "dense", "mlp": "dense", "dtype": dtype},
                "train": {"batch_size": 2},
            }
        )
        init, rebuild, _ = functional(c.model)
        params = init(jax.random.key(0))
        return reference.jit(
            lambda params: accumulated_gradients(c, rebuild, params, drawn_batch(c))[0]
        )(params)["layers"]

    assert reference.norm_error(gradient("float16"), gradient("float32")) < 0.05


@pytest.mark.parametrize("blocks", [slow(("smha", "uome")), ("long_short", "dense")], ids="+".join)
def test_gradients_of_biases_are_summed_in_float32(blocks):
    """Over 16,384 tokens: added up in bfloat16 they stood still, and were wrong by up to 0.4 of their norm."""
    tokens = np.random.default_rng(0).integers(0, 64, (128, 128))
    routed = dict(n_experts=4, k=4)  # all, so that no choice turns on a rounding
    sizes = dict(
        vocab_size=64,
        d_model=32,
        n_layers=1,
        n_heads=4,
        d_hidden=64,
        context_length=128,
        bias=True,
        norm="layernorm",
    )

    def gradient(dtype):
        c = config_lib.from_dict({"model": {
            **sizes, "attention": blocks[0], "mlp": blocks[1], "dtype": dtype, "smha": routed, "uome": routed,
            "causal": blocks[0] != "long_short",
        }}).model  # fmt: skip
        graphdef, state = nnx.split(Transformer(c, rngs=nnx.Rngs(0)))
        rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), state)
        d = jax.jit(
            jax.grad(
                lambda state: nnx.merge(graphdef, state).nll(tokens, (3 * tokens + 1) % 7)[0].mean()
            )
        )(rounded)
        return {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(d)}

    found, wanted = gradient("bfloat16"), gradient("float32")
    biases = [
        name for name in wanted if name.split("/")[-1].startswith("b") and not name.endswith("b_k")
    ]  # b_k moves no softmax
    assert {"bias_out", "b_v", "b_up"} <= {name.split("/")[-1] for name in biases}
    for name in biases:
        assert reference.norm_error(found[name], wanted[name]) < 0.02, name


ON_MESH = {
    "mla, deepseek_moe as V3": {**CAUSAL["mla, deepseek_moe as V3"], "n_heads": 8, "d_model": 32},
    "moh, skywork_moe": dict(
        attention="moh", mlp="skywork_moe", n_heads=8, moh=dict(n_shared=2, k=3), moe={**MOE, "adaptive_rate": 0.5}, bias=True, dropout=0.1
    ),
}  # fmt: skip


@pytest.mark.parametrize("sequence_parallel", [False, slow(True)])
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_MESH)
def test_every_mesh_gives_the_same_run(name, sequence_parallel):
    changes = dict(model=ON_MESH[name])
    assert_same_training(
        train_on(ONE, 3, **changes), train_on(sized(1, 2, 2, 2, sequence_parallel), 3, **changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", EFFICIENT)
def test_encoders_on_every_mesh(name, sequence_parallel):
    """Loss and gradient norm of two steps, rows padded differently; heads lie on `expert`."""
    rng = np.random.default_rng(0)
    lengths = np.array([32, 32, 17, 9, 25, 1, 30, 12])
    rows = dict(
        inputs=rng.integers(0, V, (8, 32)).astype(np.int32), segments=(np.arange(32)[None] < lengths[:, None]).astype(np.int32),
        label=rng.integers(0, 2, 8).astype(np.int32), other=np.zeros(8, np.int32), share=np.ones(8, np.float32),
    )  # fmt: skip

    def losses(sizes: dict) -> list[float]:
        model = dict(
            vocab_size=V,
            d_model=32,
            n_layers=2,
            n_heads=4,
            d_hidden=32,
            context_length=32,
            causal=False,
            task="classify",
            mlp="dense",
        )
        config = config_lib.from_dict(
            {
                "model": {**model, "attention": name, name: SIZES[name]},
                "train": {"batch_size": 8},
                "mesh": sizes,
            }
        )
        mesh = mesh_lib.make_mesh(
            config.mesh, jax.devices()[: 8 // (1 if sizes["expert"] > 1 else 8)]
        )
        with jax.set_mesh(mesh):
            program = build_program(config, mesh)
            state, out = program.init(jax.random.key(0)), []
            for _ in range(2):
                state, told = program.train_step(state, mesh_lib.put_batch(mesh, rows))
                out += [float(told["sums"].nll), float(told["grad_norm"])]
        return out

    np.testing.assert_allclose(
        losses(sized(1, 2, 2, 2, sequence_parallel)), losses(sized()), rtol=2e-5
    )


def test_an_adaptive_balance_weight_follows_what_is_dropped():
    """Skywork-MoE, equation 9: alpha' = beta·alpha + (1 − beta)·min(xi·(dropped share), its most), by layer."""
    c = model_of(**CAUSAL["dense, skywork_moe"])
    stats = jax.eval_shape(lambda: build(c)[0](draw(0, 1, CONTEXT))[1]["skywork_moe"])
    stats = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stats)
    stats = stats._replace(
        chosen_N=jnp.full((2, 4), 10.0), kept_N=jnp.array([[10.0] * 4, [5.0] * 4])
    )
    found = adapted(jnp.array([[0.2], [0.2]]), stats, c.moe)
    np.testing.assert_allclose(found, [[0.99 * 0.2], [0.99 * 0.2 + 0.01 * 0.01]], rtol=1e-6)
    wider = dataclasses.replace(c.moe, adaptive_most=1.0)
    np.testing.assert_allclose(
        adapted(jnp.array([[0.2], [0.2]]), stats, wider)[1],
        [0.99 * 0.2 + 0.01 * 0.5 * 0.5],
        rtol=1e-6,
    )


# --- accounting -------------------------------------------------------------------------------------------------

# One layer, wide: the compiler counts the body of the scan once, and elementwise work is small beside products.
WIDE = dict(
    vocab_size=256,
    d_model=512,
    n_layers=1,
    n_heads=8,
    d_hidden=2048,
    context_length=128,
    remat="none",
)
LONG = dict(
    context_length=1024
)  # where what tokens do with each other is seen beside what they do alone
COUNTED = {
    "mla": dict(attention="mla", mlp="dense", mla=dict(q_rank=128, kv_rank=192)),
    "mla, whole queries": dict(attention="mla", mlp="dense", mla=dict(q_rank=0)),
    "moh": dict(attention="moh", mlp="dense"),
    "mosa": dict(attention="mosa", mlp="dense", causal=False),
    "token_choice": dict(attention="dense", mlp="token_choice", moe=dict(k=1)),
    "expert_choice": dict(attention="dense", mlp="expert_choice", causal=False),
    **{name: dict(attention=name, mlp="dense", causal=False) for name in EFFICIENT},
    "deepseek_moe": dict(
        attention="dense",
        mlp="deepseek_moe",
        activation="swiglu",
        moe=dict(n_experts=16, k=3, n_shared=1, bias_rate=0.1),
    ),
    "xmoe": dict(attention="dense", mlp="xmoe"),
    "skywork_moe": dict(
        attention="dense", mlp="skywork_moe", moe=dict(adaptive_rate=1.0), bias=True
    ),
}


def counted(name: str, **changes) -> ModelConfig:
    return config_lib.from_dict({"model": {**WIDE, **COUNTED[name], **changes}}).model


@pytest.fixture
def one_tile(monkeypatch):
    """Attention of rows of up to 1024 in one tile: the body of a scan over tiles would be counted once."""
    monkeypatch.setattr(tiles, "LARGEST", 1024)


def counts_as_the_compiler(c: ModelConfig) -> None:
    """To 5 %, which without the attention's scores and sums would be missed by more."""
    tokens = jax.ShapeDtypeStruct((1, c.context_length), jnp.int32)
    assert compilers_count(Transformer, c, tokens) == pytest.approx(forward_flops(c), rel=0.05)


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_the_compilers(name, one_tile):
    counts_as_the_compiler(counted(name))
    counts_as_the_compiler(counted(name, **LONG))


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_kept_is_the_arrays(name):
    c = counted(name)
    tokens = jax.ShapeDtypeStruct((4, c.context_length), jnp.int32)

    def handed(n_layers: int) -> int:
        deep = counted(name, n_layers=n_layers, remat="slots")
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(deep, rngs=nnx.Rngs(0))))

        def forward(state, tokens):
            return jax.vjp(lambda state: nnx.merge(graphdef, state)(tokens)[0].mean(), state)[1]

        kept = jax.eval_shape(forward, state, tokens)
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)) - sum(
            4 * a.size for a in jax.tree.leaves(state)
        )

    assert kept_bytes(counted(name, remat="slots"), 4) == pytest.approx(
        (handed(6) - handed(2)) / 4, rel=0.01
    )


BASE = {
    **WIDE,
    **LONG,
    "causal": False,
    "smha": dict(n_experts=8, k=4, priority="score"),
    "uome": dict(n_experts=8, k=4, priority="score"),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_operations_of_every_preset_are_the_compilers(name, one_tile):
    whole = config_lib.to_dict(config_lib.from_dict({"model": BASE}))["model"]
    c = config_lib.from_dict({"model": presets.apply(name, whole)}).model
    counts_as_the_compiler(c)
    assert 0 <= idle_parameters(c) < parameters(c)


def test_active_weights():
    """K of N experts of a mixture, and the shared ones; everything else."""
    c = counted("deepseek_moe")
    expert = 3 * c.d_model * c.d_expert
    assert idle_parameters(c) == pytest.approx((16 - 3) * expert)
    assert idle_parameters(counted("mla")) == 0
    union = {"attention": "dense", "mlp": "uome", "n_layers": 1, "causal": False}
    for routing, share in (
        (dict(n_experts=8, k=4), 4 / 8),
        (dict(n_experts=8, k=4, capacity_factor=0.5), 2 / 8),  # no slots for more
        (dict(n_experts=8, k=4, capacity_factor=0.5, priority="score"), 2 / 8),
        (dict(n_experts=8, k=4, capacity_factor=2.0), 4 / 8),
        (
            dict(n_experts=8, k=4, capacity_factor=0.5, unit="hierarchical", priority="score"),
            2 / 8,
        ),  # half of a chosen sequence
    ):
        c = config_lib.from_dict({"model": {**WIDE, **union, "uome": routing}}).model
        idle = (1 - share) * (c.n_into + 1) * c.d_model * c.d_hidden
        assert idle_parameters(c) == pytest.approx(idle), routing


def test_a_run_from_before_these_sections_goes_on():
    """Its config.json says nothing of them: that is the same as their defaults."""
    whole = config_lib.to_dict(config_lib.Config())
    old = {
        key: value
        for key, value in whole["model"].items()
        if key not in set(SECTIONS.values()) - {"smha", "uome"}
    }
    before, now = config_lib.from_dict({**whole, "model": old}), config_lib.from_dict(whole)
    assert (
        len(old) < len(whole["model"])
        and before == now
        and not config_lib.changed_keys(before, now)
    )
