"""`uoe plan` against a train step that really runs on 8 devices, and its predictions on cases built to show them."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, sentence, uoe
from small_models import batch

from uoe_jax import cli
from uoe_jax.config import Config, from_dict, to_dict, with_vocabulary
from uoe_jax.data.registry import known_vocabulary
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import EXIT_DOES_NOT_FIT, UserError
from uoe_jax.plan import make as make_lib
from uoe_jax.plan.compiled import Compiled, compile_step
from uoe_jax.plan.hardware import HARDWARE
from uoe_jax.plan.make import make
from uoe_jax.plan.mesh_option import read_mesh
from uoe_jax.plan.peak import peak
from uoe_jax.plan.predict import executed_flops, expected_collectives, predict, ring
from uoe_jax.plan.report import as_json, text
from uoe_jax.train.step import build
from uoe_jax.train.task import task_of

ROUTED = dict(n_experts=8, k=4, capacity_window=32, capacity_factor=1.25)
MODEL = dict(
    vocab_size=512,
    d_model=128,
    n_layers=3,
    n_heads=8,
    d_hidden=512,
    context_length=128,
    smha=ROUTED,
    uome=ROUTED,
)
SMALL = {
    "routed, fsdp": dict(model=MODEL, train=dict(batch_size=16), mesh=dict(data=2, fsdp=4)),
    "routed, expert": dict(model=MODEL, train=dict(batch_size=16), mesh=dict(data=2, fsdp=2, expert=2)),
    "dense, data and fsdp, accumulated": dict(
        model={**MODEL, "attention": "dense", "mlp": "dense", "n_kv_heads": 4, "activation": "swiglu", "remat": "block"},
        train=dict(batch_size=32, accumulation=2), mesh=dict(data=4, fsdp=2),
    ),
}  # fmt: skip
SCORED = {**ROUTED, "priority": "score"}
ENCODER = dict(
    task="classify",
    causal=False,
    d_model=64,
    n_layers=3,
    n_heads=8,
    d_hidden=256,
    smha=SCORED,
    uome=SCORED,
)
TASKS = {
    "adaptive softmax, expert": dict(
        model={**MODEL, "vocab_size": 4096, "cutoffs": "500,1500"}, train=dict(batch_size=16), mesh=dict(data=2, fsdp=2, expert=2),
    ),
    "images, biases and learned positions": dict(
        model={**ENCODER, "stem": "image", "context_length": 64, "position": "learned", "bias": True,
               "image": dict(height=32, width=32, channels=3, patch=4), "classifier": dict(n_classes=100)},
        train=dict(batch_size=32), mesh=dict(data=2, fsdp=2, expert=2),
    ),
    "two texts, a hidden layer in the head, a token in front": dict(
        model={**ENCODER, "vocab_size": 256, "context_length": 128,
               "classifier": dict(n_classes=2, n_inputs=2, d_head=128, pooling="cls")},
        train=dict(batch_size=32, accumulation=2), mesh=dict(data=2, fsdp=4),
    ),
}  # fmt: skip


def rows_of(config: Config) -> dict:
    """A batch of a train step; of a classifier, of zeros and ones, all of them valid."""
    if config.model.task == "language":
        return batch(rows=config.train.batch_size, length=config.model.context_length)
    rng = np.random.default_rng(0)
    made = {
        name: rng.integers(0, 2, shape).astype(dtype)
        for name, (shape, dtype) in task_of(config).shapes(config).items()
    }
    return made | {"segments": np.ones_like(made["segments"])}


def really_run(config: Config) -> tuple[int, int]:
    """One step on this process's devices: (bytes of the state on one, peak that XLA reports for the program that ran)."""
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.init(jax.random.key(0))
        rows = mesh_lib.put_batch(mesh, rows_of(config))
        compiled = program.train_step.lower(state, rows).compile()
        held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
        state, metrics = compiled(state, rows)
        assert math.isfinite(float(metrics["sums"].nll)) and int(state.step) == 1
    m = compiled.memory_analysis()
    return (
        held,
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SMALL, *TASKS))
def test_peak_memory_is_what_a_run_takes(name):
    """Within 15 %: from the compilation in a process of its own, and from the counted sizes alone."""
    config = from_dict({**SMALL, **TASKS}[name])
    held, measured = really_run(config)
    plan = make(config, "cpu")
    assert (
        plan.compiled.parameters + plan.compiled.optimizer + 40 == held
    )  # and the number of the step, and the guard
    assert plan.peak == pytest.approx(measured, rel=0.15)
    counted = plan.counted.arguments + plan.counted.temporary
    assert counted == pytest.approx(measured, rel=0.15), plan.counted
    assert plan.counted.parameters == plan.compiled.parameters
    # What meshes that are not compiled are judged by moves the same bytes over every axis; sums and scores are left out.
    for axis in ("data", "fsdp", "expert"):
        moved = {source: sum(c.sent * c.times for c in found if axis in c.axes) for source, found in
                 (("compiled", plan.compiled.collectives), ("expected", expected_collectives(config, config.mesh.shape)))}  # fmt: skip
        assert moved["expected"] == pytest.approx(moved["compiled"], rel=0.1), axis
    said = text(plan, name)
    assert "Compiled for 8 host devices" in said and "MFU" not in said


@pytest.mark.parametrize("name", [*SMALL, *TASKS])
def test_what_a_step_is_given_is_counted_to_the_byte(name):
    config = from_dict({**SMALL, **TASKS}[name])
    mesh = mesh_lib.make_mesh(config.mesh)
    program = build(config, mesh)

    def held(tree) -> int:
        return sum(
            math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
            for a in jax.tree.leaves(tree)
        )

    counted = peak(config, config.mesh.shape, flash=True)
    assert counted.parameters == held(program.abstract.params)
    assert counted.batch == held(program.abstract_batch)


def counted(c: Config) -> Compiled:
    """The counted step in place of a compiled one."""
    shape = c.mesh.shape
    p = peak(c, shape, flash=False)
    arguments = round(p.arguments)
    return Compiled(arguments, arguments, arguments, round(p.temporary), 0.0, round(p.parameters), round(p.optimizer),
                    tuple(expected_collectives(c, shape)), 0.0, 0, "")  # fmt: skip


def planned(monkeypatch, config: Config, hardware: str) -> make_lib.Plan:
    monkeypatch.setattr(make_lib, "compile_step", counted)
    return make(config, hardware)


def seven_billion(mesh: dict, **model) -> Config:
    values = to_dict(cli.load_config("uoe_7b", {}))
    values["mesh"] |= dict(replica=1, data=1, fsdp=1, expert=1) | mesh
    values["model"] |= model
    return from_dict(values)


def test_seven_billion_parameters_by_hand(monkeypatch):
    """Figures that can be worked out on paper, on 8 x 32 x 2 devices of 4 rows."""
    plan = planned(monkeypatch, seven_billion(dict(data=8, fsdp=32, expert=2)), "h100")
    c, p = plan.config.model, plan.prediction
    weights = 32 * (4096 * 128 * (64 + 16) + 3 * 4096 * 14336) + 2 * 32768 * 4096
    assert plan.compiled.parameters == pytest.approx(4 * weights / 64, rel=0.01)
    assert plan.compiled.optimizer == 2 * plan.compiled.parameters == 2 * plan.expected.gradients
    stream = 4 * 4096 * 4096
    slots = (
        5 / 8 * (c.head_dim * (2 * 32 + 2 * 8) + 2 * 14336) / 2 / 4096
    )  # per value of the stream
    assert plan.expected.kept == pytest.approx(32 * 2 * stream * (2 + slots), rel=0.01)
    experts = next(t for t in plan.traffic if t.axes == ("expert",))
    assert (
        experts.sent == (4 * 32 + 2) * 2 * stream
    )  # bf16; in a ring of two a device sends all of it
    assert experts.seconds[0] == pytest.approx(experts.sent / 450e9 / 0.9)
    gathered = next(t for t in plan.traffic if t.kind == "all-gather")
    scattered = next(t for t in plan.traffic if t.kind == "reduce-scatter")
    assert gathered.slow and gathered.sent == pytest.approx(
        scattered.sent, rel=0.05
    )  # twice in bf16, once in float32
    assert p.step[0] < p.step[1] and 0.1 < p.mfu[0] < p.mfu[1] < 0.8
    assert (
        p.parts["products"][0] < p.flops / 512 / 989e12 / 0.8
    )  # flash attention is not among them
    assert plan.fits and 20e9 < plan.peak < 40e9
    assert json.loads(json.dumps(as_json(plan)))["prediction"]["step"] == list(p.step)
    said = text(plan, "uoe_7b")
    for word in (
        "7.25 B parameters",
        "512 x h100",
        "of 80 GB: fits",
        "all-gather over fsdp",
        "MFU",
        HARDWARE["h100"].source,
    ):
        assert word in said, word


def test_networks():
    """4 of a ring of 8 are in a machine: it goes out through 4 links. A TPU pod is one network; replica always leaves it."""
    shape = dict(replica=2, data=4, fsdp=8, expert=2)
    h100, v5p = HARDWARE["h100"], HARDWARE["v5p"]
    assert ring(("expert",), shape, h100).bandwidth == 450e9
    assert ring(("fsdp",), shape, h100).bandwidth == 4 * 50e9
    assert ring(("data",), shape, h100).bandwidth == 50e9
    assert ring(("fsdp", "expert"), shape, h100).bandwidth == 8 * 50e9
    assert ring(("data",), shape, v5p).bandwidth == 200e9
    assert ring(("replica",), shape, v5p).bandwidth == 6.25e9
    assert ring(("fsdp",), shape, h100).once == pytest.approx(6 * 3.4e-6 + 2 * 14e-6)


def test_too_much_for_a_device_is_said_with_a_mesh_that_fits(monkeypatch):
    plan = planned(monkeypatch, seven_billion(dict(data=64), remat="block"), "h100")
    assert plan.fits is False and plan.suggestion.mesh["fsdp"] > 1 and plan.suggestion.peak < 80e9
    assert "does not fit" in text(plan, "x") and "suggested: --mesh=" in text(plan, "x")
    again = planned(monkeypatch, seven_billion(plan.suggestion.mesh, remat="block"), "h100")
    assert again.fits and again.suggestion is None
    assert "No other mesh" in text(again, "x")


def test_no_mesh_fits(monkeypatch):
    plan = planned(monkeypatch, seven_billion(dict(fsdp=8)), "v6e")
    assert plan.suggestion is None and plan.least[1] > 32e9
    (warning,) = [w for w in as_json(plan)["warnings"] if "no mesh" in w]
    assert "train.accumulation (now 1)" in warning and "model.remat='block'" in warning


@pytest.mark.parametrize(
    "mesh, hardware, fits, code",
    [("fsdp=8", "v6e", False, EXIT_DOES_NOT_FIT), ("data=64", "h100", False, 0), ("fsdp=64", "h100", True, 0), ("fsdp=8", "cpu", None, 0)],
)  # fmt: skip
def test_where_nothing_fits_the_exit_code_says_so(mesh, hardware, fits, code, monkeypatch, capsys):
    """78 where no mesh fits; 0 where another mesh of as many devices does."""
    monkeypatch.setattr(make_lib, "compile_step", counted)
    model = ("--config.model.remat=block", "--config.mesh.data=1")
    args = ["plan", "--config=uoe_7b", f"--mesh={mesh}", f"--hardware={hardware}", "--json"]
    assert cli.main([*args, *model]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is fits and (found["least"] is None) == (code == 0)


def test_a_reduction_longer_than_its_block_is_warned_of(monkeypatch):
    """Narrow experts on many devices: on 8 GPUs the MLP's reduction takes 7/4 of the bytes of the stream at 405e9 B/s."""
    narrow = seven_billion(dict(data=8, expert=8), d_hidden=1024, d_model=1024, n_heads=8)
    plan = planned(monkeypatch, narrow, "h100")
    (warning,) = [w for w in as_json(plan)["warnings"] if "after uome" in w]
    assert "expert=8" in warning and "make mesh.expert smaller" in warning
    found = next(r for r in plan.prediction.reductions if r.block == "uome")
    assert found.reduction == pytest.approx(7 / 4 * 2 * 128 * 4096 * 1024 / (450e9 * 0.9))
    assert found.reduction > found.compute
    wide = planned(monkeypatch, seven_billion(dict(data=32, expert=2)), "h100")
    assert not [w for w in as_json(wide)["warnings"] if "reduction" in w]
    assert plan.suggestion.mesh["expert"] < 8


def test_other_kinds_of_step(monkeypatch):
    """What is said of settings that change the figures: recomputation, float32, what the compiler keeps, microbatches."""
    base = seven_billion(dict(data=8, fsdp=32, expert=2))
    plain = planned(monkeypatch, base, "h200").prediction
    again = planned(
        monkeypatch, seven_billion(dict(data=8, fsdp=32, expert=2), remat="block"), "h200"
    )
    assert (
        again.prediction.flops == plain.flops and again.prediction.executed > 1.25 * plain.executed
    )
    assert again.expected.kept < 0.3 * planned(monkeypatch, base, "h200").expected.kept
    dots = as_json(
        planned(monkeypatch, seven_billion(dict(data=64), remat="dots", dtype="float32"), "b200")
    )["warnings"]
    assert any("remat='dots'" in w for w in dots) and any("float32" in w for w in dots)
    values = to_dict(base)
    values["train"]["accumulation"] = 4
    parts = planned(monkeypatch, from_dict(values), "h200")
    assert parts.expected.kept < 0.3 * planned(monkeypatch, base, "h200").expected.kept
    assert (
        parts.prediction.parts["weights"][0] > 3 * plain.parts["weights"][0]
    )  # gathered for every microbatch
    half = predict(
        base, base.mesh.shape, dataclasses.replace(HARDWARE["h200"], network=(0.35, 0.45)), []
    )
    assert half.parts["weights"] == (0, 0) and half.step[0] < plain.step[0]


BAD = [
    (
        ("--mesh=foo=2",),
        "--mesh=foo=2: 'foo=2' names no axis; give axis=size, of replica, data, fsdp, expert",
    ),
    (("--mesh=data",), "names no axis"),
    (("--mesh=data=x",), "--mesh=data=x: data=x is no size; give a whole number from 1 on"),
    (("--mesh=data=0",), "is no size"),
    (("--mesh=data=2,data=2",), "data is given twice"),
    (
        ("--mesh=data=-1,fsdp=-1",),
        "data=-1 and fsdp=-1: only one axis can take what is left of the devices; give the others a size",
    ),
    (("--mesh=data=-1",), "--devices=N"),
    ((), "config.mesh: data=-1 takes what is left of the devices; say how many with --devices=N"),
    (("--mesh=data=64,fsdp=16",), "1024 devices; the step is compiled here for at most 512"),
    (("--devices=1024",), "--devices=1024: 1024 devices"),
    (("--devices=many",), "--devices=many: give a whole number"),
    (("--mesh=data=2", "--devices=8"), "needs 2 devices and there are 8"),
    (
        ("--mesh=data=2", "--hardware=h1000"),
        "--hardware=h1000: is not known; choose one of h100, h200, b200, v5p, v6e, or cpu",
    ),
    (("--mesh=data=3",), "config.mesh.data=3: "),
    (("--mesh=expert=8",), "config.mesh.expert=8: must divide model.smha.n_experts=4: 1, 2, 4"),
    (
        ("--mesh=data=2", "--config.model.vocab_size=5"),
        "config.model.vocab_size=5: the data have 257 tokens",
    ),
    (("--mesh=data=2", "--workdir=x"), "--workdir: unknown argument"),
    (
        ("--mesh=data=2", "--config.data.tokenizer=words"),
        "config.model.vocab_size=0: words are counted when training starts",
    ),
]


@pytest.mark.parametrize(
    "args, expected", BAD, ids=lambda v: " ".join(v) if isinstance(v, tuple) else ""
)
def test_bad_input_is_one_sentence(capsys, args, expected):
    assert expected in sentence(capsys, "plan", "--config=quickstart", *args)


def test_sizes_left_open_are_filled():
    mesh = read_mesh("data=-1,expert=2", 16, Config().mesh)
    assert mesh.shape == dict(replica=1, data=8, fsdp=1, expert=2)
    assert read_mesh(None, 4, Config().mesh).shape["data"] == 4


def test_what_only_the_other_process_refuses_is_the_same_sentence():
    odd = from_dict(SMALL["routed, fsdp"])
    odd = dataclasses.replace(odd, train=dataclasses.replace(odd.train, batch_size=12))
    with pytest.raises(UserError, match="must divide train.batch_size / train.accumulation=12"):
        compile_step(odd)


SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def shipped(name: str, mesh: str) -> Config:
    """A shipped configuration as `uoe plan` takes it, with a million vocabulary entries where they must be given."""
    overrides = {"model.vocab_size": "1000000"} if name in ("lm1b", "wikitext103") else {}
    config = cli.load_config(name, overrides)
    config = dataclasses.replace(config, mesh=read_mesh(mesh, None, config.mesh))
    return with_vocabulary(config, known_vocabulary(config)[0])


def test_a_vocabulary_of_unknown_size_must_be_given(capsys):
    for name in ("lm1b", "wikitext103"):
        said = sentence(capsys, "plan", f"--config={name}", "--mesh=fsdp=2")
        assert "config.model.vocab_size=0" in said and "give their number for a plan" in said


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_planned(monkeypatch, name):
    """From the counted step; the compiled one is in the slow tests."""
    found = planned(monkeypatch, shipped(name, "data=2,fsdp=2"), "h100")
    said = text(found, name)
    assert (
        name in said
        and "MFU" in said
        and ("the inputs" in said or "vocabulary scores" in said or "a layer" in said)
    )
    assert (
        0 < found.prediction.step[0] < found.prediction.step[1]
        and 0 < found.prediction.mfu[0] < found.prediction.mfu[1] < 1
    )
    assert json.loads(json.dumps(as_json(found)))["parameters"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "imagenet"])
def test_a_shipped_configuration_is_compiled(name):
    """One of each kind, on 4 devices, and the count is near."""
    code, out, err = uoe(
        "plan", f"--config={name}", "--mesh=data=2,fsdp=2", "--hardware=v5p", "--json"
    )
    assert code == (EXIT_DOES_NOT_FIT if name == "uoe_7b" else 0), err
    found = json.loads(out)
    assert found["factor"] == pytest.approx(1, abs=0.2) and found["peak"] > 0


def test_scores_are_made_twice_and_an_adaptive_softmax_makes_few():
    """By hand, of a token: 4 products of 2·V·D each, as scores are made again; or of the first piece, the tail and its share
    by Zipf's law."""
    plain = shipped("wikitext103", "data=2").model
    v, d, edge = 1_000_000, 400, 20_000
    one = dataclasses.replace(plain, cutoffs="")
    two = dataclasses.replace(plain, cutoffs=str(edge))
    scores = [executed_flops(Config(model=m), 1)[0] / 16 / 150 for m in (one, two)]
    tail = sum(1 / n for n in range(edge + 1, v + 1)) / sum(1 / n for n in range(1, v + 1))
    assert scores[0] - scores[1] == pytest.approx(
        4 * 2 * d * (v - (edge + 1 + tail * (v - edge))), rel=1e-3
    )


def test_two_inputs_are_two_rows_of_blocks():
    """Of an example: the blocks' products and attention count twice, the head's once."""
    c = from_dict(TASKS["two texts, a hidden layer in the head, a token in front"])
    m = c.model
    alone = dataclasses.replace(
        c, model=dataclasses.replace(m, classifier=dataclasses.replace(m.classifier, n_inputs=1))
    )
    (products, core), (half, half_core) = executed_flops(c, 1), executed_flops(alone, 1)
    head = 6 * c.train.batch_size * 128
    assert core == 2 * half_core and products - head * (4 * 64 + 2) == pytest.approx(
        2 * (half - head * (64 + 2))
    )
    assert peak(c, c.mesh.shape, flash=True).kept == 2 * peak(alone, c.mesh.shape, flash=True).kept


def test_a_failed_compilation_shows_what_it_wrote(monkeypatch):
    monkeypatch.setattr("uoe_jax.plan.compiled.FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(RuntimeError, match="(?s)ended with.*xla_no_such_flag"):
        compile_step(from_dict(SMALL["routed, fsdp"]))


@pytest.mark.slow
def test_seven_billion_parameters_on_512_devices():
    """Under five minutes on two cores, and little memory: nothing of the model is allocated."""
    begun = time.monotonic()
    code, out, err = uoe(
        "plan", "--config=uoe_7b", "--mesh=data=8,fsdp=32,expert=2", "--hardware=h100", "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert time.monotonic() - begun < 300 and found["compiled"]["process_bytes"] < 4e9
    assert (
        math.prod(found["mesh"].values()) == 512
        and found["fits"]
        and 7e9 < found["parameters"] < 7.5e9
    )
    assert found["factor"] == pytest.approx(1, abs=0.15)
    assert dict.fromkeys(("all-gather", "reduce-scatter"), True) == {
        t["kind"]: t["slow"] for t in found["traffic"] if t["axes"] == ["fsdp"] and t["sent"] > 1e6
    }
