"""Signals, bad numbers, and lost, failing or hanging processes, in real runs; the faults are put in by tests/faulty.py."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import (
    TINY,
    assert_same_run,
    finish,
    metric_lines,
    uoe,
    uoe_process,
    uoe_together,
    write_source,
)

from uoe_jax.config import GuardConfig, from_dict
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.train import step

PEER_TIMEOUT = 5  # seconds, for the tests' patience; the default is 10


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


def train_args(source, folder, *more):
    return (
        "train",
        f"--config={TINY}",
        f"--config.data.path={source}",
        f"--workdir={folder}",
        *more,
    )


def run(*args, **more):
    """(exit code, stdout, stderr) of one process with `faults`."""
    return finish([uoe_process(*args, **more)])[0]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An undisturbed run of one process with one device."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = uoe(*train_args(source, workdir))
    assert code == 0, err
    return workdir


@pytest.fixture(scope="module")
def whole_pair(source, tmp_path_factory):
    """An undisturbed run of two processes with a device each."""
    workdir = tmp_path_factory.mktemp("whole") / "pair"
    ended = finish(uoe_together(2, 1, *train_args(source, workdir)))
    assert [code for code, _, _ in ended] == [0, 0], ended
    return workdir


# --- asked to stop ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, stops_at",
    [
        ("term@evaluation@7@0", 7),
        ("term@restoring@None@0", 0),
        ("term@saving@10@0", 10),
        ("term@training@8@0,term@saving@9@0", 9),  # twice, the second while it saves
    ],
)
def test_sigterm_wherever_it_comes(fault, stops_at, whole, source, tmp_path):
    """Everything saved and exit code 75; the same command then ends with the metrics and bits of an undisturbed run."""
    args = train_args(source, tmp_path / "run")
    code, out, err = run(*args, faults=fault)
    assert code == 75 and f"stopped at step {stops_at} with everything saved" in out, err
    assert "uoe: SIGTERM: saving, then stopping" in err
    code, _, err = uoe(*args)
    assert code == 0 and (f"resuming at step {stops_at}" in err or stops_at in (0, 20)), err
    assert_same_run(whole, tmp_path / "run", 20)


@pytest.mark.slow
def test_a_checkpoint_evaluated_after_a_stop_can_be_the_best(source, tmp_path):
    """Stopped in the last evaluation, the state is saved without its loss; it gets it when the evaluation is made up for."""
    more = ("--config.train.steps=6", "--config.eval.every=0", "--config.checkpoint.every=0")
    args = train_args(source, tmp_path / "run", *more)
    assert run(*args, faults="term@evaluation@6@0")[0] == 75
    assert uoe(*args)[0] == 0
    from uoe_jax.train.checkpoint import CheckpointStore

    with CheckpointStore(tmp_path / "run", read_only=True) as store:
        assert store.best_step() == 6


@pytest.mark.slow
def test_the_test_split_is_read_once_whatever_happens(source, tmp_path):
    args = train_args(source, tmp_path / "run", "--config.eval.test=true")
    assert run(*args, faults="kill@testing@20@0")[0] == -9
    for _ in range(2):
        assert uoe(*args)[0] == 0
        (tested,) = [line for line in metric_lines(tmp_path / "run") if "test/loss" in line]
    whole = train_args(source, tmp_path / "whole", "--config.eval.test=true")
    assert uoe(*whole)[0] == 0
    assert metric_lines(tmp_path / "whole") == metric_lines(tmp_path / "run")
    code, out, _ = uoe("eval", f"--workdir={tmp_path / 'run'}", "--split=test", "--step=best")
    assert code == 0 and json.loads(out)["test/loss"] == tested["test/loss"]


@pytest.mark.slow
def test_an_evaluation_made_up_for_is_logged_once(whole, source, tmp_path):
    """Interrupted, done after the resume, and then a kill before the next checkpoint: it is done once more."""
    args = train_args(source, tmp_path / "run")
    assert run(*args, faults="term@evaluation@7@0")[0] == 75
    assert run(*args, faults="kill@training@9@0")[0] == -9
    assert uoe(*args)[0] == 0
    assert_same_run(whole, tmp_path / "run", 20)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(whole_pair, source, tmp_path):
    """Twice, while it saves, and it is not the coordinator."""
    fault = "term@saving@10@1,term@training@10@1"
    args = train_args(source, tmp_path / "run")
    # JAX looks for the signal once a second, and longer on a busy machine: time to agree on a step before the last one.
    later = "".join(f",slow@training@{i}@0" for i in range(12, 20))
    ended = finish(uoe_together(2, 1, *args, faults=fault + later))
    assert [code for code, _, _ in ended] == [75, 75], ended
    assert "with everything saved" in ended[0][1]
    ended = finish(uoe_together(2, 1, *args))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert_same_run(whole_pair, tmp_path / "run", 20)


# --- lost, failing, hanging processes ---------------------------------------------------------------------------

LOST = {
    # fault: the exit codes, and what the other one says; after a hang of 3 s, both
    "raise@training@5@1": (
        [77, 1],
        "process 1 ended at step 5 (training) with exit code 1: ValueError: boom",
    ),
    "hang@training@8@1": (
        [77, 77],
        "process 1 hangs at step 8 (training): nothing has happened there for 3 s",
    ),
    "kill@training@8@0": ([-9, 77], "process 0 was lost at step"),
    "stop@training@8@1": ([77, None], "process 1 was lost at step"),
    "kill@saving@10@1": ([77, -9], "process 1 was lost at step"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", LOST)
def test_no_process_waits_for_one_that_is_gone(fault, source, tmp_path):
    """In time, with a sentence that says which process, where and why; and with a good checkpoint to go on from."""
    codes, sentence = LOST[fault]
    more = (
        f"--config.guard.peer_timeout_s={PEER_TIMEOUT}",
        "--config.guard.hang_timeout_s=3",
        "--config.train.steps=5000",
    )
    traces = [{"UOE_TRACE": str(tmp_path / f"trace{i}")} for i in range(2)]
    pair = uoe_together(
        2, 1, *train_args(source, tmp_path / "run", *more), faults=fault, each_env=traces
    )
    hit = int(fault[-1])
    others = [p for p, code in zip(pair, codes) if code == 77]
    deadline = time.monotonic() + 200
    while any(p.poll() is None for p in others) and time.monotonic() < deadline:
        time.sleep(0.05)
    took = (
        time.time() - (tmp_path / f"trace{hit}").stat().st_mtime
    )  # the last it wrote was before the fault
    for process, code in zip(pair, codes):
        if code is None:
            process.kill()  # one that was stopped stays so
    ended = finish(pair)
    for (code, _, _), wanted in zip(ended, codes, strict=True):
        assert code == wanted or wanted is None, ended
    assert took < PEER_TIMEOUT + 3 * (codes == [77, 77]), took
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir() or "@5@" in fault  # to go on from
    for i, (_, _, err) in enumerate(ended):
        if codes[i] == 77:
            assert f"uoe: {sentence}" in err and "run the same command again" in err, err
    assert (
        codes != [77, 77] or "in at" in ended[hit][2] or "in spin" in ended[hit][2]
    )  # where it hangs: its stack


@pytest.mark.slow
def test_four_processes_all_hear_of_it(source, tmp_path):
    more = (f"--config.guard.peer_timeout_s={PEER_TIMEOUT}", "--config.train.steps=5000")
    ended = finish(
        uoe_together(4, 1, *train_args(source, tmp_path / "run", *more), faults="kill@training@5@2")
    )
    assert [code for code, _, _ in ended] == [77, 77, -9, 77], ended
    for i in (0, 1, 3):
        assert "process 2 was lost at step" in ended[i][2]


# --- bad numbers ------------------------------------------------------------------------------------------------


def test_a_bad_step_changes_nothing_but_the_count(monkeypatch):
    """Parameters, optimizer, balancing biases and running moments bit for bit; and the next good step is counted again."""
    values = tiny.get_config().to_dict()
    for block in ("smha", "uome"):
        values["model"][block]["bias_rate"] = 0.01
    config = from_dict({**values, "model": {**values["model"], "vocab_size": 64}})
    real = step.accumulated_gradients

    def poisoned(config, rebuild, params, batch):
        grads, sums = real(config, rebuild, params, batch)
        return jax.tree.map(
            lambda g: g + jnp.where(batch["n_bytes"][0] == 7, jnp.nan, 0), grads
        ), sums

    monkeypatch.setattr(step, "accumulated_gradients", poisoned)
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = step.build(config, mesh)
        batch = {name: np.ones(s.shape, np.int32) for name, s in program.abstract_batch.items()}
        good = mesh_lib.put_batch(mesh, batch)
        bad = mesh_lib.put_batch(mesh, {**batch, "n_bytes": np.full_like(batch["n_bytes"], 7)})
        state, _ = program.train_step(program.init(jax.random.key(0)), good)
        before = jax.device_get(state)
        state, found = program.train_step(state, bad)
        after = jax.device_get(state)
        assert np.isnan(found["grad_norm"]) and int(found["guard"].in_a_row) == 1
        counts = dict(skipped=before.guard.skipped, in_a_row=before.guard.in_a_row)
        same = after._replace(step=before.step, guard=after.guard._replace(**counts))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(same), strict=True):
            assert a.tobytes() == b.tobytes()
        assert (int(after.step), int(after.guard.skipped)) == (2, 1)
        state, found = program.train_step(state, good)
        assert (int(found["guard"].in_a_row), int(found["guard"].skipped)) == (0, 1)
        assert any(
            (a != b).any()
            for a, b in zip(
                jax.tree.leaves(after.params), jax.tree.leaves(jax.device_get(state.params))
            )
        )


def test_a_spike_is_bad_and_a_slope_is_not():
    c, state = GuardConfig(spike_sigmas=6.0), step.fresh_guard()
    rng = np.random.default_rng(0)
    judge = jax.jit(lambda g, loss, norm: step.judge(c, g, loss, norm))
    for i in range(300):  # a loss that falls and a norm that wanders
        bad, state = judge(
            state,
            jnp.float32(5 - i / 100 + rng.normal() * 0.05),
            jnp.float32(1 + rng.normal() * 0.1),
        )
        assert not bad, i
    for loss, norm in ((20.0, 1.0), (2.0, 50.0), (np.nan, 1.0), (2.0, np.inf)):
        bad, after = judge(state, jnp.float32(loss), jnp.float32(norm))
        assert bad and int(after.skipped) == 1
        assert np.array_equal(after.mean, state.mean) and np.array_equal(
            after.variance, state.variance
        )
    assert not judge(state, jnp.float32(2.0), jnp.float32(1.0))[0]
    steady = step.fresh_guard()
    for _ in range(
        1000
    ):  # a spread of a thousandth of the mean, where the mean of squares has no digits left
        bad, steady = judge(
            steady, jnp.float32(10 + rng.normal() * 0.01), jnp.float32(10 + rng.normal() * 0.01)
        )
        assert not bad
    early, _ = step.judge(c, step.fresh_guard(), jnp.float32(1e9), jnp.float32(1e9))
    assert not early  # nothing is known yet
    off, _ = step.judge(GuardConfig(), state, jnp.float32(1e9), jnp.float32(1e9))
    assert not off


def skipped(workdir):
    """{step: steps skipped so far} where that number grows."""
    lines = [line for line in metric_lines(workdir) if "train/loss" in line]
    counts = [(line["step"], line["train/skipped"]) for line in lines]
    return {s: n for (_, before), (s, n) in zip([(0, 0), *counts], counts) if n != before}


@pytest.mark.slow
def test_nan_on_one_of_two_processes_is_skipped_by_both(source, tmp_path):
    ended = finish(
        uoe_together(2, 1, *train_args(source, tmp_path / "run"), faults="nan@training@4+9+10@1")
    )
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert skipped(tmp_path / "run") == {5: 1, 10: 2, 11: 3}  # batch i makes step i + 1
    assert "step 11 skipped: loss" in ended[0][2] and "(2 in a row, 3 in all)" in ended[0][2]


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_with_good_checkpoints(source, tmp_path):
    args = train_args(source, tmp_path / "run", "--config.guard.max_bad_steps=3")
    ended = finish(uoe_together(2, 1, *args, faults="nan@training@7+8+9@1"))
    assert [code for code, _, _ in ended] == [76, 76], ended
    assert (
        "config.guard.max_bad_steps=3: 3 steps in a row" in ended[0][2]
        and "the checkpoint of step 5 is from before them" in ended[0][2]
    )
    code, _, err = uoe(
        *args, "--config.mesh.data=1"
    )  # the numbers were the process's: without it the run goes on
    assert code == 0 and "resuming at step 5" in err


@pytest.mark.slow
def test_roll_back_leaves_out_the_data_and_survives_a_kill(source, tmp_path):
    """Back to step 5; the next batch is the one after the bad ones. The same, bit for bit, where the run is killed twice."""
    args = ("--config.guard.max_bad_steps=2", "--config.guard.rollbacks=1")
    fault = "nan@training@7+8@0"
    code, _, err = run(*train_args(source, tmp_path / "whole", *args), faults=fault)
    assert (
        code == 0
        and "2 bad steps in a row: back to step 5, leaving out the data of the steps up to 9" in err
    ), err
    lines = {
        line["step"]: line for line in metric_lines(tmp_path / "whole") if "train/loss" in line
    }
    assert (
        sorted(lines) == list(range(1, 21))
        and lines[5]["train/rollbacks"] == 0
        and lines[6]["train/rollbacks"] == 1
    )
    for kill in ("kill@training@8@0", "kill@training@12@0"):
        assert run(*train_args(source, tmp_path / "run", *args), faults=f"{fault},{kill}")[0] == -9
    assert run(*train_args(source, tmp_path / "run", *args), faults=fault)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run", 20)


def test_no_way_back_is_exit_76(source, tmp_path):
    args = train_args(
        source, tmp_path / "run", "--config.guard.max_bad_steps=2", "--config.guard.rollbacks=1"
    )
    code, _, err = run(*args, faults="nan@training@0+1@0")
    assert code == 76 and "there is no checkpoint from before them" in err, err


@pytest.mark.slow
def test_a_bad_last_step_is_saved(source, tmp_path):
    """Where rollbacks are allowed no checkpoint is made within a bad stretch, but at the end there must be one."""
    args = train_args(
        source, tmp_path / "run", "--config.guard.rollbacks=1", "--config.train.steps=8"
    )
    assert run(*args, faults="nan@training@7@0")[0] == 0
    assert (tmp_path / "run" / "checkpoints" / "8").is_dir()


@pytest.mark.slow
def test_a_stop_within_a_bad_stretch_takes_no_way_back(source, tmp_path):
    """Saved at step 8, between two bad steps, with one checkpoint kept: the one from before the stretch stays as well."""
    more = ("--config.guard.max_bad_steps=3", "--config.guard.rollbacks=1")
    more += ("--config.checkpoint.keep_latest=1", "--config.checkpoint.keep_best=0")
    fault = "nan@training@7+8+9@0"
    assert run(*train_args(source, tmp_path / "whole", *more), faults=fault)[0] == 0
    args = train_args(source, tmp_path / "run", *more)
    assert run(*args, faults=f"{fault},term@training@8@0")[0] == 75
    code, _, err = run(*args, faults=fault)
    assert code == 0 and "back to step 5" in err, err
    assert_same_run(tmp_path / "whole", tmp_path / "run", 20)
