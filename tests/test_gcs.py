"""A workdir on gs://: the same commands against a stand-in with the semantics of objects (gcs_server.py)."""

from __future__ import annotations

import json
import logging
import signal
from typing import Callable, Iterator

import pytest
from etils import epath
from gcs_server import GcsServer
from helpers import (
    QUICK_CODE,
    TINY,
    environment,
    finish,
    metric_lines,
    uoe,
    uoe_process,
    uoe_together,
    write_source,
)

from uoe_jax import cli, workdir
from uoe_jax.config import Config, from_dict
from uoe_jax.errors import RunError, UserError
from uoe_jax.train import metrics
from uoe_jax.train.metrics import MetricsWriter, read_metrics

EVERY = ("--config.checkpoint.every=4", "--config.eval.every=4")
SHORT = ("--config.train.steps=8", *EVERY)


@pytest.fixture(scope="module")
def server() -> Iterator[GcsServer]:
    with GcsServer("bucket") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def gcs(server) -> GcsServer:
    """The stand-in, empty."""
    server.objects.clear()
    server.refuses.clear()
    server.before_upload = lambda key: None
    return server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


def train_args(source, name: str, *more: str) -> list[str]:
    return ["train", f"--config={TINY}", f"--workdir={name}", f"--config.data.path={source}", *more]


def lines(gcs: GcsServer, run: str) -> list[dict]:
    """metrics.jsonl in the bucket without what depends on the clock."""
    found = [
        json.loads(line) for line in gcs.objects[f"bucket/{run}/metrics.jsonl"].data.splitlines()
    ]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in found]


def at_upload(gcs: GcsServer, which: Callable[[str], bool], do: Callable[[], None]) -> None:
    """Once, before an upload is stored that `which` says yes to."""
    done = []

    def hook(key: str) -> None:
        if not done and which(key):
            done.append(key)
            do()

    gcs.before_upload = hook


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(gcs, source, tmp_path, monkeypatch):
    """Stopped by SIGTERM before its first checkpoint; then the same command ends as an undisturbed local run does."""
    monkeypatch.chdir(tmp_path)
    short = ("--config.train.stop_after=8", *EVERY)  # no sample at the end
    local = uoe_process(*train_args(source, tmp_path / "local", *short))
    run = uoe_process(*train_args(source, "gs://bucket/run", *short))
    at_upload(
        gcs, lambda key: key.endswith("metrics.jsonl"), lambda: run.send_signal(signal.SIGTERM)
    )
    (code, _, _), (stopped, out, err) = finish([local, run])
    assert code == 0 and stopped == 75, err
    assert (
        "uoe: gs://bucket/run: no lock against a second writer, no check of free space; metrics.jsonl"
        in err
    )
    assert (
        "stopped at step 4 " in out and "bucket/run/checkpoints/4/commit_success.txt" in gcs.objects
    )
    code, out, err = uoe(*train_args(source, "gs://bucket/run", *short))
    assert code == 0 and "resuming at step 4 " in err, err
    assert lines(gcs, "run") == metric_lines(tmp_path / "local")
    assert gcs.names("bucket/run/tensorboard/") and gcs.names("bucket/") == [
        f"run/{n}" for n in gcs.names("bucket/run/")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "local"
    ]  # and no directory called "gs:"


@pytest.mark.slow
def test_a_run_is_killed_again_and_again(gcs, source, tmp_path):
    """By SIGKILL at an upload: of the configuration, metrics, in the midst of a checkpoint, and of what commits it."""
    assert uoe(*train_args(source, tmp_path / "local"))[0] == 0
    for count, name in [
        (1, "config.json"),
        (1, "d/"),
        (9, ""),
        (1, "10/commit_success.txt"),
        (12, ""),
        (2, "metrics.jsonl"),
    ]:
        run = uoe_process(*train_args(source, "gs://bucket/run"))
        left = [count]

        def is_due(key: str) -> bool:
            left[0] -= name in key
            return left[0] == 0

        at_upload(gcs, is_due, run.kill)
        ((code, _, err),) = finish([run])
        assert code == -signal.SIGKILL, (name, err)
    gcs.before_upload = lambda key: None
    code, _, err = uoe(*train_args(source, "gs://bucket/run"))
    assert code == 0, err
    assert lines(gcs, "run") == metric_lines(tmp_path / "local")
    names = gcs.names("bucket/run/checkpoints/")
    assert {
        name for name in names if name.count("/") == 1 and name.endswith("/commit_success.txt")
    } == {
        f"{step}/commit_success.txt" for step in {name.split("/")[0] for name in names}
    }  # and what the killed ones left was cleaned up


@pytest.mark.slow
def test_two_processes_share_a_workdir(gcs, source):
    """And one that goes on alone, on the same mesh, reads what both wrote."""
    env = [gcs.environment()] * 2
    args = train_args(source, "gs://bucket/run", *SHORT, "--config.train.stop_after=4")
    ended = finish(uoe_together(2, 1, *args, each_env=env))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "no lock" in ended[0][2] and "no lock" not in ended[1][2]
    two = environment(XLA_FLAGS=f"{QUICK_CODE} --xla_force_host_platform_device_count=2")
    assert uoe(*train_args(source, "gs://bucket/run", *SHORT), env=two)[0] == 0
    assert [line["step"] for line in lines(gcs, "run") if "train/loss" in line] == list(range(1, 9))


@pytest.mark.slow
def test_readers_read_only(gcs, source):
    """Evaluation and generation work where the right to write is missing."""
    assert uoe(*train_args(source, "gs://bucket/run", *SHORT))[0] == 0
    gcs.refuses = {"POST", "PUT", "DELETE"}
    code, out, err = uoe("eval", "--workdir=gs://bucket/run", "--split=validation")
    assert code == 0, err
    assert (
        json.loads(out)["eval/loss"]
        == [line["eval/loss"] for line in lines(gcs, "run") if "eval/loss" in line][-1]
    )
    code, out, err = uoe("generate", "--workdir=gs://bucket/run", "--prompt=def ")
    assert code == 0 and "[step 8: " in err, err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_copied_away(gcs, source, tmp_path):
    """One flipped bit in the newest checkpoint: it is set aside whole, and the run goes on from the one before."""
    assert uoe(*train_args(source, tmp_path / "local", *EVERY))[0] == 0
    assert (
        uoe(*train_args(source, "gs://bucket/run", *EVERY, "--config.train.stop_after=8"))[0] == 0
    )
    (key,) = [
        k for k in gcs.objects if k.startswith("bucket/run/checkpoints/8/state/ocdbt.process_0/d/")
    ]
    data = bytearray(gcs.objects[key].data)
    data[len(data) // 2] ^= 1
    gcs.put(key, bytes(data), {})
    before = gcs.names("bucket/run/checkpoints/8/")
    code, _, err = uoe(*train_args(source, "gs://bucket/run", *EVERY))
    assert code == 0 and "damaged" in err and "resuming at step 4 " in err, err
    assert (
        gcs.names("bucket/run/damaged/8/") == before
        and key.replace("checkpoints", "damaged") in gcs.objects
    )
    assert lines(gcs, "run") == metric_lines(tmp_path / "local")


@pytest.mark.slow
def test_a_storage_that_fails_ends_the_run(gcs, source):
    """One sentence, exit code 1; once it works again the same command goes on."""

    def refuse() -> None:
        gcs.refuses = {"POST", "PUT"}

    at_upload(gcs, lambda key: key.endswith("checkpoints/5/commit_success.txt"), refuse)
    code, _, err = uoe(*train_args(source, "gs://bucket/run"))
    said = [line for line in err.splitlines() if line.startswith("uoe: ")][1:]  # the first: no lock
    assert (
        code == 1
        and len(said) == 1
        and "gs://bucket/run/" in said[0]
        and "run the same command again" in said[0]
    ), err
    gcs.refuses.clear()
    code, _, err = uoe(*train_args(source, "gs://bucket/run"))
    assert code == 0 and "step 20/20" in err, err


# --- the parts --------------------------------------------------------------------------------------------------


def test_the_configuration_on_gs(gcs, capsys):
    path = workdir.open_workdir("gs://bucket/run", Config())
    assert path == epath.Path("gs://bucket/run") and gcs.names("bucket/run/") == ["config.json"]
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        workdir.open_workdir("gs://bucket/run", Config()) == path
    )  # a second writer is not noticed
    assert workdir.read_config("gs://bucket/run") == Config()
    with pytest.raises(
        UserError, match="config.train.seed=1: the run in gs://bucket/run was started with 0"
    ):
        workdir.open_workdir("gs://bucket/run", from_dict({"train": {"seed": 1}}))
    workdir.check_record("gs://bucket/run", {"sha256": "a", "tokenizer": "byte"})
    with pytest.raises(
        UserError, match="data.sha256='b': the run in gs://bucket/run was trained on 'a'"
    ):
        workdir.check_record("gs://bucket/run", {"sha256": "b", "tokenizer": "byte"})
    gcs.put("bucket/other/thing", b"", {})
    with pytest.raises(UserError, match="gs://bucket/other: holds other files .thing"):
        workdir.open_workdir("gs://bucket/other", Config())


def test_addresses_that_cannot_be_used(gcs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="gs://typo/run: cannot be written .*give a directory you may write to"
    ):
        workdir.open_workdir("gs://typo/run", Config())
    with pytest.raises(UserError, match="--workdir=gs://bucket/none: no run there"):
        workdir.read_config("gs://bucket/none")
    gcs.refuses = {"POST", "PUT"}
    with pytest.raises(UserError, match="gs://bucket/run: cannot be written .*[Ff]orbidden"):
        workdir.open_workdir("gs://bucket/run", Config())
    assert gcs.buckets == {"bucket"} and not gcs.objects
    for address in ("s3://bucket/run", "gs://", "gs:///run", "file:///tmp/run"):
        for command in (("train", f"--config={TINY}"), ("eval",), ("generate",)):
            assert cli.main([*command, f"--workdir={address}"]) == 2
            assert (
                f"--workdir={address}: is neither a local directory nor gs://bucket/name"
                in capsys.readouterr().err
            )
    monkeypatch.setattr(workdir.importlib.util, "find_spec", lambda name: None)
    for command in (("train", f"--config={TINY}"), ("eval",), ("generate",)):
        assert cli.main([*command, "--workdir=gs://bucket/run"]) == 2
        err = capsys.readouterr().err
        assert (
            err
            == "uoe: --workdir=gs://bucket/run: gs:// takes the package gcsfs; pip install 'uoe-jax[gs]'\n"
        )
    assert not list(tmp_path.iterdir())


def test_tracebacks_go_to_gs_or_to_the_screen(gcs, capsys):
    error = ValueError("boom")
    cli._unexpected(error, "gs://bucket/run")  # nothing is there, so nothing is put there
    err = capsys.readouterr().err
    assert (
        not gcs.objects
        and err.endswith("uoe: ValueError: boom (traceback above)\n")
        and err.count("boom") == 2
    )
    gcs.put("bucket/run/config.json", b"{}", {})
    cli._unexpected(error, "gs://bucket/run")
    assert (
        capsys.readouterr().err
        == "uoe: ValueError: boom (traceback in gs://bucket/run/error.txt)\n"
    )
    assert gcs.objects["bucket/run/error.txt"].data == b"ValueError: boom\n"
    gcs.refuses = {"POST", "PUT"}
    cli._unexpected(error, "gs://bucket/run")
    assert capsys.readouterr().err.endswith("uoe: ValueError: boom (traceback above)\n")


def test_metrics_are_uploaded_at_flush_and_once_a_minute(gcs, monkeypatch, caplog):
    key = "bucket/run/metrics.jsonl"
    writer = MetricsWriter("gs://bucket/run", tensorboard=False)
    writer.write(1, {"x": 1.0})
    assert key not in gcs.objects
    writer.flush()
    first = gcs.objects[key]
    assert first.data == b'{"step": 1, "x": 1.0}\n'
    writer.flush()
    assert gcs.objects[key] == first  # nothing new, nothing uploaded
    monkeypatch.setattr(metrics, "UPLOAD_EVERY_S", -1)
    writer.write(2, {"x": 2.0})
    assert [line["step"] for line in read_metrics("gs://bucket/run")] == [1, 2]
    gcs.refuses = {"POST", "PUT"}
    with caplog.at_level(logging.WARNING, "uoe_jax"):
        writer.write(3, {"x": 3.0})  # goes on: this upload is for those who look
    assert [r.levelname for r in caplog.records if "could not be uploaded now" in r.message] == [
        "WARNING"
    ]
    with pytest.raises(
        RunError,
        match="gs://bucket/run/metrics.jsonl: a line could not be written .*same command again",
    ):
        writer.flush()
    gcs.refuses.clear()
    writer.close()
    writer.close()
    assert [line["step"] for line in read_metrics("gs://bucket/run")] == [1, 2, 3]


def test_metrics_on_gs_are_cut_at_the_step_of_the_resume(gcs):
    gcs.put(
        "bucket/run/metrics.jsonl", b'{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n{"step": 3', {}
    )
    writer = MetricsWriter("gs://bucket/run", resume_step=1, tensorboard=False)
    assert (
        b'"step": 2' in gcs.objects["bucket/run/metrics.jsonl"].data
    )  # nothing is lost before something takes its place
    writer.write(2, {"x": 5.0})
    writer.close()
    assert read_metrics("gs://bucket/run") == [{"step": 1, "x": 1.0}, {"step": 2, "x": 5.0}]
    MetricsWriter("gs://bucket/run", tensorboard=False).close()
    assert read_metrics("gs://bucket/run") == []
    with pytest.raises(
        UserError, match="gs://bucket/none/metrics.jsonl: there are no metrics here"
    ):
        read_metrics("gs://bucket/none")
