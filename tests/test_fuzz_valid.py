"""Random valid configurations train: two steps each, on eight devices."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import jax
import numpy as np
import pytest
from fuzz_rules import HUGE, TABLE
from helpers import TINY, metric_lines, write_source

from uoe_jax import cli, config
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.infer.sample import sample
from uoe_jax.moe.routing import keep_by_position
from uoe_jax.train.main import train
from uoe_jax.train.step import build


def valid(rng: random.Random, causal: bool = True) -> dict[str, Any]:
    """A random configuration that keeps every rule, for eight devices: {key: value}."""
    pick = rng.choice
    c: dict[str, Any] = {"model.causal": causal, "train.steps": 2}
    for name in ("bias", "qk_norm", "tie_embeddings"):
        c[f"model.{name}"] = pick((True, False))
    for name in ("activation", "norm", "position", "dtype", "remat"):
        c[f"model.{name}"] = pick(TABLE[f"model.{name}"].split("|"))
    attention, mlp = pick(("smha", "smha", "dense")), pick(("uome", "uome", "dense"))
    kv, group = pick((1, 2, 4, 4)), pick((1, 1, 2))
    heads, width = kv * group, pick((2, 4, 8) if c["model.position"] == "rope" else (1, 2, 3, 8))
    n = {"smha": pick([d for d in (1, 2, 4, kv, kv) if kv % d == 0]), "uome": pick((1, 2, 3, 4, 4))}
    d_model, d_hidden = heads * width, n["uome"] * pick((1, 2, 6))
    patch = {"smha": pick((1, 1, 2, 3)), "uome": pick((1, 1, 2, 4))}
    length = math.lcm(*patch.values()) * pick((2, 4, 5, 8))
    c |= {
        "model.n_layers": pick((1, 2)), "model.n_heads": heads, "model.n_kv_heads": kv if group > 1 else pick((0, kv)),
        "model.d_model": d_model, "model.d_hidden": d_hidden, "model.context_length": length, "model.attention": attention,
        "model.mlp": mlp, "model.vocab_size": pick((0, 257, 300)), "model.norm_eps": pick((1.2e-38, 1e-6, 1.0)),
        "model.rope_theta": pick((1, 1e4, 1e12)), "model.dropout": pick((0, 0.1, 0.99)),
        "model.attention_dropout": pick((0, 0.1)), "optimizer.schedule": pick(("cosine", "linear")), "model.cutoffs": pick(("", "20,100")),
    }  # fmt: skip
    expert = pick([e for e in (1, 2, 2, 4, 4) if cuts_evenly(e, n, kv, d_hidden, attention, mlp)])
    fsdp = pick([f for f in (1, 2, 4) if d_model % f == 0 and f * expert <= 8])
    replica = pick([r for r in (1, 2) if r * fsdp * expert <= 8])
    parts = 8 // expert
    own, microbatches = pick((1, 2, 4)), pick((1, 1, 2, 3))
    c |= {
        "mesh.expert": expert, "mesh.fsdp": fsdp, "mesh.replica": replica, "mesh.data": pick((-1, parts // fsdp // replica)),
        "mesh.sequence_parallel": length % expert == 0 and pick((True, False)),
        "train.batch_size": own * parts * microbatches, "train.accumulation": microbatches,
        "eval.batch_size": pick((0, parts, 3 * parts)),
    }  # fmt: skip
    for block in ("smha", "uome"):
        routing = valid_routing(rng, n[block], patch[block], own, causal)
        c |= {f"model.{block}.{name}": value for name, value in routing.items()}
    return c | valid_run(rng, length)


def valid_routing(
    rng: random.Random, n_experts: int, patch_size: int, own: int, causal: bool
) -> dict[str, Any]:
    """A random routing of one block; own: rows of a device's microbatch."""
    pick = rng.choice
    k = rng.randint(1, n_experts)
    gates = ["sigmoid", "score", "straight_through", "none", *["normalized"] * (k > 1)]
    r = {
        "n_experts": n_experts, "k": k, "patch_size": patch_size, "gate": pick(gates), "order": pick(("gather", "project")),
        "capacity_factor": pick((1.2e-38, 0.3, 1.0, 1.3, 1e6)), "capacity_window": pick((1, 2, 7, 64, 100_000)),
        "dispatch": pick(("auto", "inverse", "scatter", "onehot")), "router_bias": pick((True, False)), "router_noise": pick((0, 0.5, 1e3)),
        "balance_weight": pick((0, 0.01, 1)), "z_weight": pick((0, 1e-3)), "bias_rate": pick((0, 0.01, 1)),
        "sequence_group": HUGE,
    }  # fmt: skip
    if not causal:
        r |= {
            "unit": pick(("patch", "sequence", "hierarchical")),
            "priority": pick(("position", "score")),
        }
        if r["unit"] != "patch":
            r |= {"sequence_capacity_factor": pick((0, 0.01, 1.25, 1e6)), "sequence_group": own}
            if (
                r["sequence_capacity_factor"] and r["dispatch"] == "onehot"
            ):  # which has a row for every sequence
                r["dispatch"] = "inverse"
    return r


def valid_run(rng: random.Random, length: int) -> dict[str, Any]:
    """Random keys of the other sections; length: of the context."""
    pick = rng.choice
    room = length - 2  # the separator, and a token to draw
    return {
        "optimizer.learning_rate": pick((1.2e-38, 1e-3, 1e-2)), "optimizer.warmup_steps": pick((0, 1, 2, 100, HUGE)),
        "optimizer.decay_steps": pick((0, 1, 50, HUGE)), "optimizer.final_fraction": pick((0, 0.1, 1)),
        "optimizer.weight_decay": pick((0, 0.1)), "optimizer.b1": pick((0, 0.9, 0.999999)), "optimizer.b2": pick((0, 0.95, 0.999999)),
        "optimizer.eps": pick((1e-8, 1)), "optimizer.clip_norm": pick((0, 1e-30, 1, 1e9)), "train.seed": pick((0, HUGE)),
        "train.log_every": pick((1, HUGE)), "train.stop_after": pick((0, 0, 1, HUGE)), "train.deterministic": pick((True, False)),
        "eval.every": pick((0, 1, HUGE)), "eval.batches": pick((0, 1, HUGE)), "checkpoint.every": pick((0, 1, HUGE)),
        "checkpoint.keep_latest": pick((1, 2, HUGE)), "checkpoint.keep_best": pick((0, 1, HUGE)),
        "guard.spike_sigmas": pick((0, 1e6)), "guard.max_bad_steps": pick((1, HUGE)), "guard.rollbacks": pick((0, 1000)),
        "guard.hang_timeout_s": pick((0, 300)), "guard.compile_timeout_s": pick((0, 1800)), "guard.peer_timeout_s": pick((1, 1e5)),
        "generate.prompt": pick(("", "d", "é" * 20, "def f(x):"))[: room // 2], "generate.max_tokens": pick((1, 3, HUGE)),
        "generate.temperature": pick((0, 1.2e-38, 0.7, 1e3)), "generate.top_k": pick((0, 1, 5, HUGE)),
        "generate.top_p": pick((1.2e-38, 0.9, 1)), "generate.seed": pick((0, HUGE)),
    }  # fmt: skip


def cuts_evenly(
    expert: int, n: dict[str, int], kv: int, d_hidden: int, attention: str, mlp: str
) -> bool:
    """Whether both blocks can be cut in so many parts."""
    a, m = n["smha"] if attention == "smha" else kv, n["uome"] if mlp == "uome" else d_hidden
    return a % expert == 0 and m % expert == 0


def test_a_window_longer_than_the_row_takes_no_memory():
    chosen = jax.ShapeDtypeStruct((2, 8, 4), bool)
    assert str(HUGE) not in str(jax.make_jaxpr(lambda a: keep_by_position(a, HUGE, 1))(chosen))


@pytest.fixture
def as_commands_run(request):
    """jax as a command sets it up: promotion as usual, and what one sitting compiled is there for the next."""
    patience = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", patience)
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()  # what fifty configurations compile takes gigabytes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files", 90)


WHOLE_RUNS, STEPS_ALONE = (7, 11), range(12, 16)  # 11: float16, two sittings


@pytest.mark.slow
@pytest.mark.parametrize("seed", WHOLE_RUNS)
def test_valid_configurations_train(seed, source, tmp_path, capsys, as_commands_run):
    """Two steps, in one sitting or two: finite, saved, and there is nothing left to do."""
    values = valid(random.Random(seed)) | {"data.path": source}
    overrides = {name: str(value) for name, value in values.items()}
    print(
        " ".join(f"--config.{name}={value!r}" for name, value in overrides.items())
    )  # shown where it fails
    assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    if values["train.stop_after"] == 1:
        overrides["train.stop_after"] = "0"
        assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    lines = metric_lines(tmp_path / "run")
    trained = [line["train/loss"] for line in lines if "train/loss" in line]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert (
        trained
        and evaluated
        and lines[-1]["step"] == 2
        and np.isfinite([*trained, *evaluated]).all()
    ), lines
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert "nothing left" not in capsys.readouterr().err
    assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    assert "nothing left to train, 2 of 2 steps are done" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", STEPS_ALONE)
def test_valid_models_train(seed):
    """Two steps without a run; half of them with what a language model may not have, as it looks at later tokens."""
    rng = random.Random(seed)
    values: dict[str, Any] = {}
    drawn = valid(rng, causal=seed % 2 == 0) | {"model.vocab_size": 11}
    for name, value in (drawn | {"model.cutoffs": drawn["model.cutoffs"] and "2,7"}).items():
        *parents, last = name.split(".")
        section = values
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    print(json.dumps(values))
    c = config.from_dict(values)
    mesh = mesh_lib.make_mesh(c.mesh)
    shape = (c.train.batch_size, c.model.context_length)
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, 11, shape)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "segments": np.ones(shape),
        "positions": np.arange(shape[1]) + np.zeros(shape),
    }
    batch = {name: a.astype(np.int32) for name, a in batch.items()} | {
        "n_bytes": np.full(shape[0], shape[1], np.int32)
    }
    with jax.set_mesh(mesh):
        program = build(c, mesh)
        state = program.init(jax.random.key(c.train.seed))
        for _ in range(2):
            state, found = program.train_step(state, mesh_lib.put_batch(mesh, batch))
    assert (
        int(state.step) == 2
        and np.isfinite(float(found["sums"].nll))
        and np.isfinite(float(found["grad_norm"]))
    )
