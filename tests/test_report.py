"""`uoe report`: what is drawn is what was logged and what the model did; the page itself is opened in test_report_page.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import (
    ROOT,
    TINY,
    environment,
    metric_lines,
    slow,
    uoe,
    uoe_process,
    wait_for_step,
    write_source,
)
from report_runs import SMALL, write_run

from uoe_jax import cli
from uoe_jax.config import from_dict
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.report import build as report_build
from uoe_jax.report.sample import Sample, of_text, pieces, routes
from uoe_jax.report.series import names, read_log
from uoe_jax.train.step import build
from uoe_jax.workdir import read_config

ROUTING = dict(n_experts=4, k=2, capacity_window=8, patch_size=2)
ENCODER = dict(causal=False, task="classify", classifier=dict(n_classes=3, pooling="cls"))


def program_of(model, devices=1, **mesh):
    config = from_dict(
        {"model": {**SMALL, **model}, "train": {"batch_size": 4}, "mesh": {"data": 1, **mesh}}
    )
    mesh = mesh_lib.make_mesh(config.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        return config, mesh, program, program.init(jax.random.key(0)).params


def text_rows(config, rows=3):
    """Rows of random text, the last one half empty."""
    length = config.model.context_length
    tokens = np.random.default_rng(0).integers(0, 256, (rows, length), np.int32)
    segments = np.ones_like(tokens)
    segments[-1, length // 2 :] = 0
    return tokens, segments, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


BLOCKS = {
    "uoe": dict(smha=ROUTING, uome=ROUTING),
    "tokens": dict(
        smha=ROUTING | {"patch_size": 1}, uome=ROUTING | {"patch_size": 1, "gate": "normalized"}
    ),
    "mixture": dict(attention="dense", mlp="token_choice", moe=dict(n_experts=4, k=2, d_expert=16)),
    "encoder": ENCODER
    | dict(
        smha=ROUTING | {"priority": "score"},
        uome=ROUTING | {"unit": "hierarchical", "priority": "score"},
    ),
    "mosa": ENCODER | dict(attention="mosa", mlp="uome", uome=ROUTING | {"unit": "sequence"}),
}


@pytest.mark.parametrize("name", [n if n == "uoe" else slow(n) for n in BLOCKS])
def test_routes_are_those_of_the_forward_pass(name):
    """By block and layer as many patches at every expert as the statistics count, none of padding, with weights >= 0."""
    config, mesh, program, params = program_of(BLOCKS[name])
    tokens, segments, positions = text_rows(config)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    if config.model.task == "classify":
        batch = {"inputs": tokens, "segments": segments}
    shown = Sample(
        batch, [["x"] * 32] * 3, None, (0, 0), config.model.block_length - 32, ["a", "b", "c"]
    )
    with jax.set_mesh(mesh):
        found = routes(program, params, shown, config)
        model = program.model(params)
        stats = (
            model(tokens, segments)
            if config.model.task == "classify"
            else model(tokens, segments, positions)
        )[1]
    assert set(found) == set(stats)
    for block, weights in found.items():
        taken = weights >= 0
        np.testing.assert_array_equal(taken.sum(axis=(1, 2)), np.asarray(stats[block].kept_N))
        padded = (16 + shown.before) // config.model.routed()[block].patch_size + 1
        assert not taken[:, 2, padded:].any() and taken[:, :2].any(axis=(2, 3)).all()


def test_routes_are_the_same_on_a_mesh():
    tokens = None
    found = []
    for devices, sizes in ((1, {}), (8, dict(data=2, fsdp=2, expert=2))):
        config, mesh, program, params = program_of(BLOCKS["uoe"], devices, **sizes)
        tokens = text_rows(config) if tokens is None else tokens
        shown = Sample(
            dict(zip(("tokens", "segments", "positions"), tokens)),
            [["x"] * 32] * 3,
            None,
            (0, 0),
            0,
            ["a", "b", "c"],
        )
        with jax.set_mesh(mesh):
            found.append(routes(program, params, shown, config))
    for block in found[0]:
        np.testing.assert_allclose(found[1][block], found[0][block], rtol=1e-5, atol=1e-6)


def test_curves_are_means_and_ranges_of_what_was_logged(tmp_path):
    run = write_run(tmp_path / "run", 1000)
    lines = [
        line for line in (run / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    loss = np.array([json.loads(line)["train/loss"] for line in lines]).reshape(100, 10)
    found = read_log(str(run), read_config(str(run)), "run", points=100)
    curve = found.curves["train/loss"]
    for got, wanted in (
        (curve.mean, loss.mean(1)),
        (curve.low, loss.min(1)),
        (curve.high, loss.max(1)),
        (curve.step, 10 * np.arange(100) + 5.5),
    ):
        np.testing.assert_allclose(got, wanted)
    np.testing.assert_allclose(curve.tokens, 100 * curve.step)  # every step had 100
    load = np.array([json.loads(line)["train/uome/load"] for line in lines])
    own = found.routing["uome"]
    assert own.load.shape == (2, 200, 8) and own.edges[0] == 1 and own.edges[-1] == 1001
    np.testing.assert_allclose(
        own.load, load.reshape(200, 5, 2, 8).mean(1).transpose(1, 0, 2), rtol=1e-6
    )
    assert found.last["eval"]["step"] == found.step == 1000


def test_numbers_that_are_not_finite_leave_a_gap(tmp_path):
    run = write_run(tmp_path / "run", 20)
    text = (run / "metrics.jsonl").read_text().splitlines()
    text[3] = text[3].replace(re.search(r'"train/loss": ([\d.]+)', text[3])[1], '"nan"')
    (run / "metrics.jsonl").write_text("\n".join(text) + "\n{torn")
    curve = read_log(str(run), read_config(str(run)), "run").curves["train/loss"]
    assert len(curve.step) == 19 and 4 not in curve.step and np.isfinite(curve.mean).all()


def test_names_tell_runs_apart():
    assert names(["runs/a", "runs/b"]) == ["a", "b"]
    assert names(["one/run", "two/run/"]) == ["one/run", "two/run"]
    assert len(set(names(["x", "x"]))) == 2


def test_characters_of_several_tokens():
    tokenizer, m = ByteTokenizer(), from_dict({"model": SMALL | {"n_heads": 8}}).model
    ids = np.append(256, tokenizer.encode("né"))
    assert pieces(ids, tokenizer, m) == ["▮", "n", "", "é"]
    shown = of_text(from_dict({"model": SMALL | {"n_heads": 8}}), "x" * 100, tokenizer)
    assert len(shown.texts[0]) == 32 and shown.batch["segments"].sum() == 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, options) of a run of a few steps that wrote its report."""
    place = tmp_path_factory.mktemp("report")
    options = [f"--config.data.path={write_source(place / 'source')}"]
    command_line = [
        "train",
        f"--config={TINY}",
        *options,
        f"--workdir={place / 'run'}",
        "--config.train.steps=6",
        "--config.train.report=true",
    ]
    assert cli.main(command_line) == 0
    return place / "run"


def data_of(file):
    """What page.js is given."""
    return json.loads(
        re.search(
            r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.DOTALL
        )[1]
    )


@pytest.mark.slow
def test_training_writes_it(trained):
    (run,) = data_of(trained / "report.html")
    assert run["step"] == 6 and not run["why"]
    weights = run["blocks"]["uome"]["routes"]
    assert weights["shape"][0] == 2 and weights["shape"][3] == 4
    text = "".join(run["sample"]["texts"][0])
    assert "return x" in text or "def f" in text


@pytest.mark.slow
def test_it_needs_nothing_else(trained):
    """No script, style, picture or font comes from elsewhere."""
    page = (trained / "report.html").read_text()
    assert not re.findall(r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(?!data:)', page)
    assert "@import" not in page and "url(http" not in page


def test_own_text_and_another_checkpoint(trained, capsys, tmp_path):
    assert (
        cli.main(
            [
                "report",
                f"--workdir={trained}",
                "--text=def f(x):",
                f"--out={tmp_path / 'own.html'}",
                "--step=5",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "own.html")
    (run,) = data_of(tmp_path / "own.html")
    assert run["step"] == 5 and run["sample"]["texts"] == [["▮", *"def f(x):"]]


def test_a_run_in_progress_and_one_that_does_not_route(trained, tmp_path):
    """Beside each other: their curves are shown, and why there is no sample of theirs."""
    young = write_run(tmp_path / "young", 30)
    dense = write_run(tmp_path / "dense", 30, attention="dense", mlp="dense")
    out = tmp_path / "both.html"
    assert (
        cli.main(
            [
                "report",
                f"--workdir={young}",
                f"--workdir={dense}",
                f"--workdir={trained}",
                f"--out={out}",
            ]
        )
        == 0
    )
    first, second, third = data_of(out)
    assert (
        "no checkpoints" in first["why"]
        and first["sample"] is None
        and first["blocks"]["smha"]["load"]
    )
    assert second["blocks"] == {} and "not route" in second["why"]
    assert third["sample"]["texts"]


def test_a_report_that_fails_costs_nothing_else(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report_build, "routes", lambda *args: 1 / 0)
    options = [
        "train",
        f"--config={trained / 'config.json'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=1",
    ]
    assert cli.main(options) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    assert "ZeroDivisionError" in caplog.text and "uoe report" in caplog.text


@pytest.mark.parametrize(
    "options, said",
    [
        (["--workdir=/nonexistent/run"], "no run there"),
        (["--workdir={run}", "--workdir={run}"], "--out=FILE"),
        (["--workdir={run}", "--step=77"], "give latest, best, or one of"),
        (["--workdir={run}", "--out=/nonexistent/x.html"], "cannot be written"),
    ],
)
def test_what_cannot_be_reported(options, said, trained, capsys):
    assert cli.main(["report", *(option.format(run=trained) for option in options)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("uoe: ") and err.count("\n") == 1


@pytest.mark.slow
def test_while_it_trains(tmp_path):
    """From the files of a process that holds the workdir and goes on undisturbed."""
    options = [
        f"--config.data.path={write_source(tmp_path / 'source')}",
        "--config.train.steps=100000",
        "--config.eval.every=0",
    ]
    process = uoe_process("train", f"--config={TINY}", *options, f"--workdir={tmp_path / 'run'}")
    try:
        wait_for_step(tmp_path / "run", 12, process)
        code, out, err = uoe("report", f"--workdir={tmp_path / 'run'}")
        assert (code, err) == (0, "")
        (run,) = data_of(tmp_path / "run" / "report.html")
        assert (
            run["step"] >= 5
            and run["sample"]["texts"]
            and "in progress" in (tmp_path / "run" / "report.html").read_text()
        )
        wait_for_step(tmp_path / "run", metric_lines(tmp_path / "run")[-1]["step"] + 5, process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_images_and_expressions(tmp_path):
    """Pictures of 8 x 8 pixels as 2 x 2 squares; ListOps as its symbols."""
    workdir = tmp_path / "digits"
    assert (
        cli.main(
            ["train", "--config=digits:tiny", f"--workdir={workdir}", "--config.train.report=true"]
        )
        == 0
    )
    (run,) = data_of(workdir / "report.html")
    sample = run["sample"]
    assert len(sample["pictures"]) == 6 and sample["pictures"][0].startswith("data:image/png")
    high, wide = sample["grid"]
    assert run["blocks"]["smha"]["routes"]["shape"][2] == high * wide + sample["before"]
    workdir = tmp_path / "listops"
    assert (
        cli.main(
            [
                "train",
                "--config=lra_listops:tiny",
                f"--workdir={workdir}",
                "--config.train.report=true",
            ]
        )
        == 0
    )
    (run,) = data_of(workdir / "report.html")
    assert run["sample"]["texts"][0][0].startswith("[M") or run["sample"]["texts"][0][
        0
    ].strip() in ("[MIN", "[MAX", "[MED", "[SM", "[")


def test_memory_is_logged(trained):
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert 1e8 < line["perf/host_peak_bytes"] < 1e12 and line["perf/device_peak_bytes"] == "n/a"


def test_bokeh_is_loaded_only_for_reports():
    """The command line starts without it."""
    program = "import sys, uoe_jax.cli, uoe_jax.train.main, uoe_jax.report.build; assert 'bokeh' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), cwd=ROOT)
