"""`uoe train` in real processes: it learns, stops, resumes bit for bit, and its numbers stay what they were."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    TINY,
    assert_same_run,
    environment,
    metric_lines,
    slow,
    uoe,
    uoe_process,
    wait_for_step,
    write_source,
)

from uoe_jax.config import from_dict
from uoe_jax.data.tokenizers.load import ByteTokenizer
from uoe_jax.train.loop import Clock
from uoe_jax.train.main import sample_prompt


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """An undisturbed run of 20 steps, and what it printed: (workdir, progress, result)."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = uoe(
        "train", f"--config={TINY}", f"--workdir={workdir}", f"--config.data.path={source}"
    )
    assert code == 0, err
    return workdir, err, out


def test_what_a_run_reports(finished):
    workdir, progress, result = finished
    for word in ("starting", "step 20/20", "bits per byte", "tokens/s", "left", "validation loss"):
        assert word in progress, word
    for word in ("validation at step 20", "bits per byte", "a sample:", "uoe generate"):
        assert word in result, word
    assert (workdir / "config.json").is_file() and (workdir / "tensorboard").is_dir()
    record = json.loads((workdir / "record.json").read_text())["data"]
    assert len(record["sha256"]) == 64


def test_metrics_hold_what_contract_4_asks(finished):
    lines = metric_lines(finished[0])
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == list(range(1, 21))
    last = train[-1]
    for key in ("train/bits_per_byte", "train/grad_norm", "train/learning_rate"):
        assert isinstance(last[key], float), key
    for block in ("smha", "uome"):
        for key in ("dropped", "untouched", "load_max", "dead", "entropy", "balance"):
            assert len(last[f"train/{block}/{key}"]) == 2, (block, key)  # per layer
        assert np.shape(last[f"train/{block}/kept_by_quarter"]) == (2, 4)
        assert np.shape(last[f"train/{block}/load"]) == (2, 4)
    evaluated = {line["step"]: line for line in lines if "eval/loss" in line}
    assert list(evaluated) == [7, 14, 20]
    assert (
        evaluated[20]["eval/rows"] > evaluated[14]["eval/rows"]
    )  # the last one takes the whole split
    assert train[-1]["train/loss"] < 0.75 * train[0]["train/loss"]


def test_perf_keys(finished):
    line = json.loads((finished[0] / "metrics.jsonl").read_text().splitlines()[9])
    assert line["perf/tokens_per_second"] > 0 and line["perf/model_flops_per_second"] > 0
    assert line["perf/mfu"] == "n/a"  # nobody knows the peak of this CPU


def test_tokens_a_second_are_of_all_steps_since_the_last_reading(monkeypatch):
    """Not of the one that is read at: batches that are padded to their rows' lengths hold very different numbers of tokens."""
    now = iter([0.0, 1.0, 4.0, 7.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    assert clock.read(1) is None
    for tokens in (100, 20, 30):
        clock.count(tokens)
    with clock.paused():  # an evaluation of 3 seconds, which is left out
        pass
    assert clock.read(4) == (4.0 / 3, 150 / 4.0)
    clock.count(7)
    assert clock.read(5) == (1.0, 7.0)


REFERENCE = {1: 5.9783, 10: 2.4459, 20: 1.7509}


def test_reference_numbers(finished):
    """Initial and trained losses of the toy run. A change here is right only if initialisation, data order, the model
    or the optimizer was changed on purpose: then say so in the commit and put in the new figures."""
    losses = {
        line["step"]: line["train/loss"]
        for line in metric_lines(finished[0])
        if "train/loss" in line
    }
    for step, expected in REFERENCE.items():
        assert losses[step] == pytest.approx(expected, rel=2e-3), (step, losses[step])


def test_keeps_latest_and_best(finished):
    kept = sorted(int(p.name) for p in (finished[0] / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [15, 20]  # 20 is the newest and the best


def test_a_finished_run_says_so(finished, source):
    workdir, _, result = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    code, out, err = uoe(
        "train", f"--config={TINY}", f"--workdir={workdir}", f"--config.data.path={source}"
    )
    assert code == 0 and "20 of 20" in err, err
    assert out == result
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "sig,expected", [(signal.SIGKILL, -9), slow(signal.SIGINT, 75), slow(signal.SIGTERM, 75)]
)
def test_stopped_and_resumed_is_bit_for_bit_the_same(finished, source, tmp_path, sig, expected):
    args = (
        "train",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={source}",
    )
    process = uoe_process(*args)
    wait_for_step(tmp_path / "run", random.randrange(1, 17), process)
    process.send_signal(sig)
    out, err = process.communicate(timeout=120)
    assert process.returncode == expected, err
    if expected == 75:
        assert "with everything saved" in out
    code, _, err = uoe(*args)
    assert code == 0, err
    assert_same_run(finished[0], tmp_path / "run", 20)


@pytest.mark.slow
def test_two_sittings_and_accumulation(source, tmp_path):
    """stop_after ends a sitting; 4 microbatches a step; N then M steps are N + M steps bit for bit."""
    args = (
        "train",
        f"--config={TINY}:accumulate",
        f"--config.data.path={source}",
        "--config.train.steps=6",
    )
    assert uoe(*args, f"--workdir={tmp_path / 'whole'}")[0] == 0
    more = ("--config.train.stop_after=3", "--config.train.deterministic=True")
    code, out, err = uoe(*args, f"--workdir={tmp_path / 'parts'}", *more)
    assert (
        code == 0 and "step 3 of 6" in out and "deterministic: nothing to turn on for cpu" in err
    ), err
    assert uoe(*args, f"--workdir={tmp_path / 'parts'}")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)


@pytest.mark.slow
def test_accumulation_changes_nothing(finished, source, tmp_path):
    code, _, err = uoe(
        "train",
        f"--config={TINY}:accumulate",
        f"--workdir={tmp_path}",
        f"--config.data.path={source}",
    )
    assert code == 0, err
    for one, other in zip(metric_lines(finished[0]), metric_lines(tmp_path), strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-4), (one["step"], key)


def test_eval_counts_every_row_once(finished, source):
    workdir = finished[0]
    last = [line for line in metric_lines(workdir) if "eval/loss" in line][-1]
    code, out, err = uoe("eval", f"--workdir={workdir}")
    assert code == 0, err
    found = json.loads(out)
    assert out.count("\n") == 1
    assert (found["step"], found["split"]) == (20, "validation")
    assert found["eval/loss"] == last["eval/loss"] and found["eval/rows"] == last["eval/rows"]
    code, out, _ = uoe("eval", f"--workdir={workdir}", "--split=test", "--step=15")
    assert code == 0 and json.loads(out)["step"] == 15


@pytest.mark.slow
def test_generate(finished):
    workdir = finished[0]
    args = ("generate", f"--workdir={workdir}", "--prompt=def f1_1(x):", "--max_tokens=12")
    code, greedy, err = uoe(*args, "--temperature=0")
    assert code == 0, err
    assert greedy.startswith("def f1_1(x):")
    assert (
        "[cache of 64 tokens: 16.5 kB, 0.50 of the 32.8 kB of dense attention]" in err
    )  # K/N of it, and the routers' state
    assert uoe(*args, "--temperature=0")[1] == greedy
    drawn = [uoe(*args, "--temperature=2.0", f"--seed={seed}")[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    code, _, err = uoe("generate", f"--workdir={workdir}", "--prompt=" + "x" * 64)
    assert code == 2 and "context_length=64" in err


def test_a_program_compiled_on_one_core_is_not_run_on_two(tmp_path):
    """XLA divides loops among the cores it finds, which JAX's key of the cache does not tell."""
    code = (
        "import os, sys; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])\n"
        "import jax; from uoe_jax.distributed import setup; from uoe_jax.config import Config\n"
        "setup.start(Config()); jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))); print(jax.config.jax_compilation_cache_dir)"
    )
    env = environment(UOE_CACHE=str(tmp_path))
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    found = [
        subprocess.run(
            [sys.executable, "-c", code, n], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        for n in ("1", "2")
    ]
    assert found == [
        str(tmp_path / f"jax_{n}_cores") for n in (1, min(2, len(os.sched_getaffinity(0))))
    ]
    assert all(os.stat(folder).st_mode & 0o777 == 0o700 for folder in found)


def test_the_prompt_of_the_sample_is_of_the_data():
    """Where it is left at its default, which begins Python code, and the data are other text."""
    tokens = np.array([256, *b"Once upon a time", 256, *b"there was"])
    row = {"tokens": tokens, "segments": np.repeat([1, 2], [17, 10])}
    data = SimpleNamespace(validation=[row], tokenizer=ByteTokenizer())
    for more, prompt in (
        ({"data": {"source": "text", "path": "x"}}, "Once upon a"),
        ({"data": {"source": "text", "path": "x"}, "generate": {"prompt": "In"}}, "In"),
        ({}, "def "),
    ):
        config = from_dict({"model": {"context_length": 64}, **more})
        assert sample_prompt(config, data) == prompt
