"""Several processes: their place, their rows, every decision agreed, and the numbers of one process."""

from __future__ import annotations

import json
import signal

import pytest
from helpers import (
    TINY,
    assert_same_run,
    finish,
    metric_lines,
    uoe_together,
    wait_for_step,
    write_source,
)

from uoe_jax import workdir
from uoe_jax.config import Config
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError

PLACE = {"UOE_COORDINATOR": "node1:8476", "UOE_PROCESSES": "2", "UOE_PROCESS_ID": "1"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


# --- the place of a process -------------------------------------------------------------------------------------------------


def test_a_process_has_its_place_or_is_alone():
    assert coordination.cluster_from_env({}) is None
    assert coordination.cluster_from_env(PLACE) == ("node1:8476", 2, 1)
    assert coordination.cluster_from_env({"SLURM_STEP_NUM_TASKS": "1", "PATH": "/bin"}) is None


@pytest.mark.parametrize(
    "environ, sentence",
    [
        ({**PLACE, "UOE_PROCESSES": ""}, "UOE_PROCESSES: is not set while UOE_COORDINATOR is"),
        ({**PLACE, "UOE_COORDINATOR": "node1"}, "UOE_COORDINATOR=node1: give host:port"),
        (
            {**PLACE, "UOE_COORDINATOR": "node1:99999"},
            "UOE_COORDINATOR=node1:99999: give host:port",
        ),
        (
            {**PLACE, "UOE_COORDINATOR": "http://node1:80"},
            "UOE_COORDINATOR=http://node1:80: give host:port",
        ),
        (
            {**PLACE, "UOE_COORDINATOR": "node1:\u00b2"},
            "UOE_COORDINATOR=node1:\u00b2: give host:port",
        ),
        (
            {**PLACE, "UOE_PROCESSES": "\u00b2"},
            "UOE_PROCESSES=\u00b2: give the number of processes",
        ),
        ({**PLACE, "UOE_PROCESSES": "0"}, "UOE_PROCESSES=0: give the number of processes"),
        ({**PLACE, "UOE_PROCESSES": "two"}, "UOE_PROCESSES=two: give the number of processes"),
        ({**PLACE, "UOE_PROCESS_ID": "2"}, "UOE_PROCESS_ID=2: give a number from 0 to 1"),
        ({**PLACE, "UOE_PROCESS_ID": "-1"}, "UOE_PROCESS_ID=-1: give a number from 0 to 1"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "4 tasks were started and none was given its place"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environ, sentence):
    with pytest.raises(UserError, match=sentence):
        coordination.cluster_from_env(environ)


# --- agreeing ---------------------------------------------------------------------------------------------------


def test_what_one_process_cannot_do_stops_all(source, tmp_path):
    """A workdir that process 0 refuses: one sentence, from process 0; both leave with exit code 2, and soon."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("not a run")
    ended = finish(uoe_together(2, 1, *train_args(source, tmp_path / "run")), timeout=60)
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "holds other files" in ended[0][2] and "Traceback" not in ended[0][2]
    assert "holds other files" not in ended[1][2]


def test_different_configurations_are_refused(source, tmp_path):
    more = [("--config.train.seed=0",), ("--config.train.seed=1",)]
    ended = finish(uoe_together(2, 1, *train_args(source, tmp_path / "run"), each=more), timeout=60)
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert (
        "config.train.seed=1 in process 1 and 0 in process 0: start every process with the same"
        in ended[0][2]
    )
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_in_one_process_ends_all(source, tmp_path):
    """Process 1 cannot write its cache: it says so, and process 0 leaves with the same code, and soon."""
    (tmp_path / "file").write_text("")
    caches = [{}, {"UOE_CACHE": str(tmp_path / "file" / "cache")}]
    ended = finish(
        uoe_together(2, 1, *train_args(source, tmp_path / "run"), each_env=caches), timeout=60
    )
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert "UOE_CACHE=" in ended[1][2] and "UOE_CACHE=" not in ended[0][2]


def test_a_workdir_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    """As another machine would see it: what process 0 says it wrote is not there."""
    monkeypatch.setattr(
        coordination, "on_process_zero", lambda do: [*do()[:1], "written elsewhere"]
    )
    monkeypatch.setattr(workdir, "SHOWS_UP_S", 0)
    with pytest.raises(
        UserError,
        match="--workdir=.*does not find in .* what process 0 wrote there; give a directory that all",
    ):
        workdir.enter_workdir(str(tmp_path / "run"), Config())


# --- the same numbers -------------------------------------------------------------------------------------------


def train_args(source, folder, *more):
    return (
        "train",
        f"--config={TINY}",
        f"--config.data.path={source}",
        f"--workdir={folder}",
        *more,
    )


def trained(n, devices, source, folder, *more):
    """Trains in n processes; returns what process 0 printed."""
    ended = finish(uoe_together(n, devices, *train_args(source, folder, *more)))
    assert [code for code, _, _ in ended] == [0] * n, ended
    for _, out, err in ended[1:]:  # one process reports
        assert not out and "step 1/20" not in err
    return ended[0][1]


@pytest.mark.slow
def test_two_processes_are_one_and_stop_together(source, tmp_path):
    """Every logged number; and SIGTERM to the process that is not the coordinator stops both at one step, everything
    saved, from where a single process goes on to the same end."""
    whole = trained(1, 2, source, tmp_path / "whole")
    pair = uoe_together(2, 1, *train_args(source, tmp_path / "run"))
    wait_for_step(tmp_path / "run", 3, pair[0])
    pair[1].send_signal(signal.SIGTERM)
    ended = finish(pair)
    assert [code for code, _, _ in ended] == [75, 75], ended
    assert "with everything saved" in ended[0][1]
    stopped = metric_lines(tmp_path / "run")[-1]["step"]
    assert 3 <= stopped < 20
    rest = trained(1, 2, source, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 20)
    assert (
        rest.split("a sample:")[1].splitlines()[1:3]
        == whole.split("a sample:")[1].splitlines()[1:3]
    )


MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2")


@pytest.mark.slow
def test_a_checkpoint_is_continued_by_any_number_of_processes(source, tmp_path):
    """Stopped at steps 7 and 13, by 2, 1 and 4 processes in turn: every metric and the last checkpoint bit for bit those of
    one process that was not stopped; a canary, too, for Gloo's reduce-scatter. On other meshes in turn, losses to 1e-5."""
    whole, parallel = tmp_path / "whole", (*MESH, "--config.mesh.sequence_parallel=True")
    trained(1, 8, source, whole, *parallel)
    stops = [f"--config.train.stop_after={stop}" for stop in (7, 13, 20)]
    for stop, (n, devices) in zip(stops, ((2, 4), (1, 8), (4, 2))):
        trained(n, devices, source, tmp_path / "chain", *parallel, stop)
    assert_same_run(whole, tmp_path / "chain", 20)
    for stop, mesh in ((stops[0], MESH), (stops[2], ("--config.mesh.fsdp=4",))):
        trained(1, 8, source, tmp_path / "meshes", *mesh, stop)
    for one, other in zip(metric_lines(whole), metric_lines(tmp_path / "meshes"), strict=True):
        for key in {"train/loss", "eval/loss"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-5), (one["step"], key)


@pytest.mark.slow
def test_evaluation_counts_every_row_once_in_any_number_of_processes(source, tmp_path):
    trained(2, 1, source, tmp_path / "run")
    found = []
    for n, devices in ((1, 2), (2, 1)):
        ended = finish(
            uoe_together(n, devices, "eval", f"--workdir={tmp_path / 'run'}", "--split=test")
        )
        assert [code for code, _, _ in ended] == [0] * n, ended
        assert not any(out for _, out, _ in ended[1:])
        found.append(json.loads(ended[0][1]))
    assert found[0] == found[1]
    rows = json.loads((tmp_path / "run" / "record.json").read_text())["data"]["n_rows"]["test"]
    assert found[0]["test/rows"] == rows
