"""One writer a workdir, and one sentence for every workdir that cannot be used or goes away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Iterator

import pytest
from helpers import (
    TINY,
    environment,
    finish,
    metric_lines,
    slow,
    uoe_process,
    wait_for_step,
    write_source,
)

from uoe_jax import cli, workdir
from uoe_jax.config import Config, from_dict, to_dict
from uoe_jax.errors import RunError, UserError
from uoe_jax.train.metrics import MetricsWriter, read_metrics

ENDLESS = ("--config.train.steps=100000", "--config.eval.every=0")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    yield
    for path in list(workdir._locks):
        workdir.release(path)


def train_args(source, path, *more: str) -> list[str]:
    return ["train", f"--config={TINY}", f"--workdir={path}", f"--config.data.path={source}", *more]


def refusal(path) -> str:
    """The sentence with which a workdir is refused."""
    with pytest.raises(UserError) as caught:
        workdir.open_workdir(str(path), Config())
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# --- one writer -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused(source, tmp_path):
    """The first goes on undisturbed, readers are let in, and what SIGKILL leaves behind keeps nobody out."""
    run = tmp_path / "run"
    args = train_args(
        source,
        run,
        *ENDLESS,
        "--config.checkpoint.every=20",
        "--config.checkpoint.keep_latest=10000",
    )
    first = uoe_process(*args)
    try:
        wait_for_step(run, 45, first)
        second = uoe_process(*args)
        reader = uoe_process("eval", f"--workdir={run}")
        (code, _, err), (read, out, read_err) = finish([second, reader])
        said = f"process {first.pid} on {socket.gethostname()} has been writing there since 20"
        assert code == 2 and f"uoe: --workdir={run}: {said}" in err and err.count("\n") == 1, err
        assert (
            "stop it, or give another --workdir" in err
            and read == 0
            and json.loads(out)["step"] >= 20
        ), read_err
        wait_for_step(run, metric_lines(run)[-1]["step"] + 5, first)
        steps = [line["step"] for line in metric_lines(run)[:-1]]
        assert steps == list(range(1, len(steps) + 1)) and not list(run.glob("error*"))
    finally:
        first.kill()
        first.communicate()
    config = workdir.read_config(str(run))
    assert workdir.open_workdir(str(run), config) == run


def test_all_keys_that_differ_are_named_with_a_way_to_go_on(tmp_path):
    config = from_dict({"train": {"steps": 20}})
    workdir.release(workdir.open_workdir(str(tmp_path / "run"), config))
    longer = {"train": {"steps": 450, "log_every": 7}, "optimizer": {"decay_steps": 450}}
    with pytest.raises(UserError) as raised:
        workdir.open_workdir(str(tmp_path / "run"), from_dict(longer))
    workdir.release(tmp_path / "run")
    text = str(raised.value)
    assert "config.optimizer.decay_steps=450" in text and "config.train.steps=450" in text
    assert f"--config.train.init_from={tmp_path}/run" in text and "give the old values" in text
    assert "with --config.optimizer.decay_steps=20 the schedule stays" in text
    assert "log_every" not in text
    longer["optimizer"]["decay_steps"] = 20  # as the message says
    assert workdir.open_workdir(str(tmp_path / "run"), from_dict(longer)) == tmp_path / "run"
    workdir.release(tmp_path / "run")
    with pytest.raises(UserError, match="config.train.seed=1: .* was started with 0; give the old"):
        seed = {"train": {"steps": 20, "seed": 1}}
        workdir.open_workdir(str(tmp_path / "run"), from_dict(seed))


def test_a_lock_belongs_to_one_process_and_not_to_its_children(tmp_path):
    """A forked child neither keeps its parent's lock nor gives it up."""
    code = (
        "import os, sys, time; from uoe_jax import workdir; from uoe_jax.config import Config\n"
        "workdir.open_workdir(sys.argv[1], Config())\n"
        "child = os.fork()\n"
        "if not child: time.sleep(100), os._exit(0)\n"
        "print(child, flush=True), sys.stdin.read(), os._exit(0)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    child = int(holder.stdout.readline())
    try:
        time.sleep(0.1)
        assert f"process {holder.pid} on " in refusal(tmp_path)
        holder.stdin.close()
        assert holder.wait(timeout=30) == 0
        assert workdir.open_workdir(str(tmp_path), Config()) == tmp_path
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_lock_is_released_and_taken_again(tmp_path):
    code = "import sys; from uoe_jax import config, workdir; workdir.open_workdir(sys.argv[1], config.Config())"

    def other() -> int:
        return subprocess.run(
            [sys.executable, "-c", code, tmp_path], env=environment(), stderr=subprocess.DEVNULL
        ).returncode

    path = workdir.open_workdir(str(tmp_path), Config())
    workdir.open_workdir(str(tmp_path), Config())  # it is ours
    assert other() == 1
    for go_away in (shutil.rmtree, lambda p: p.rename(p.parent / "moved")):
        go_away(tmp_path)
        workdir.open_workdir(str(tmp_path), Config())  # another directory of this name: locked anew
        assert other() == 1
    workdir.release(path)
    workdir.release(path)
    assert other() == 0


def test_who_holds_a_lock_is_not_always_known(tmp_path):
    for text in ("", "{", "[]", "{}"):
        (tmp_path / ".lock").write_text(text)
        with (tmp_path / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            said = "another process is writing there; stop it, or give another --workdir"
            assert refusal(tmp_path) == f"--workdir={tmp_path}: {said}"
    assert [path.name for path in tmp_path.iterdir()] == [
        ".lock"
    ]  # nothing was written before the lock was ours


def test_where_there_are_no_locks_the_run_says_so(tmp_path, monkeypatch, capsys):
    def flock(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # noqa: B007, raised by flock
        assert workdir.open_workdir(str(tmp_path), Config()) == tmp_path
        err = capsys.readouterr().err
        assert (
            err.startswith(f"uoe: {tmp_path}: nothing keeps a second writer out")
            and err.count("\n") == 1
        )
    code = errno.EIO
    assert "cannot be written (Input/output error)" in refusal(tmp_path)


# --- workdirs that cannot be used -------------------------------------------------------------------------------


def test_what_failed_starts_leave_is_no_obstacle(tmp_path):
    for name in (".lock", "error.txt", "error_3.txt", ".config.json.123", ".record.json.4"):
        (tmp_path / name).write_text("")
    workdir.open_workdir(str(tmp_path), Config())
    for name in ("errors", "notes.txt", ".lock2", ".git"):
        foreign = tmp_path / f"with {name}"
        foreign.mkdir()
        (foreign / name).write_text("")
        assert f"holds other files ({name}, …) and no run; give an empty directory" in refusal(
            foreign
        )
        assert [path.name for path in foreign.iterdir()] == [
            name
        ]  # no lock in a directory that is not ours


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"3",
        b'{"model": 3}',
        b'{"nothing": {}}',
        b'{"train": {"steps": "x"}}',
    ],
)
def test_a_damaged_config(tmp_path, capsys, text):
    (tmp_path / "config.json").write_bytes(text)
    for command in (("eval",), ("generate",)):
        assert cli.main([*command, f"--workdir={tmp_path}"]) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith(f"uoe: {tmp_path / 'config.json'}: cannot be ") and err.count("\n") == 1
        )
        assert "restore it, or start in another --workdir" in err
    assert f"{tmp_path / 'config.json'}: cannot be " in refusal(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == text


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[]", b"{}", b'{"data": 3}', b'{"data": {"sha256": 1}}']
)
def test_a_damaged_record(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(
        UserError,
        match="(record.json: cannot be read .*|data.sha256='a': .*); .*another --workdir(| with .*init_from=.*)$",
    ) as caught:
        workdir.check_record(tmp_path, {"sha256": "a", "tokenizer": "byte"})
    assert (
        caught.value.exit_code == 2
        and "\n" not in str(caught.value)
        and str(tmp_path) in str(caught.value)
    )
    assert (tmp_path / "record.json").read_bytes() == text


def test_directories_in_the_place_of_files(tmp_path):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "record.json").mkdir()
    (tmp_path / "metrics.jsonl").mkdir()
    assert "config.json: cannot be read (Is a directory); restore it" in refusal(tmp_path)
    with pytest.raises(UserError, match="record.json: cannot be read .Is a directory"):
        workdir.check_record(tmp_path, {})
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read .Is a directory"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .Is a directory"):
        MetricsWriter(tmp_path)


def test_files_in_the_place_of_directories(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--workdir={path}: cannot be written (" in refusal(path)
        with pytest.raises(UserError, match="no run there|cannot be read .Not a directory"):
            workdir.read_config(str(path))


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """Root may do anything, so it is somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_workdir_without_permissions():
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        values = json.dumps(to_dict(Config()))
        for file in ("config.json", "metrics.jsonl", "record.json"):
            (path / file).write_text(values)
            (path / file).chmod(0)
        path.chmod(0o555)
        with without_rights():
            assert (
                "cannot be written (Permission denied); give a directory you may write to"
                in refusal(path)
            )
            assert f"--workdir={path / 'sub'}: cannot be written (Permission denied)" in refusal(
                path / "sub"
            )
            for read in (workdir.read_config, read_metrics, lambda p: workdir.check_record(p, {})):
                with pytest.raises(
                    UserError, match=f"^{path}/.*: cannot be read .Permission denied.; "
                ):
                    read(name)
            with pytest.raises(
                UserError, match="metrics.jsonl: cannot be written .Permission denied"
            ):
                MetricsWriter(path)
        path.chmod(0o755)


@pytest.mark.mount
def test_a_read_only_workdir(tmp_path):
    workdir.open_workdir(str(tmp_path), Config())
    workdir.check_record(tmp_path, {"sha256": "a"})
    MetricsWriter(tmp_path).close()
    workdir.release(tmp_path)
    for options in (["--bind", tmp_path, tmp_path], ["-o", "remount,ro,bind", tmp_path]):
        subprocess.run(["mount", *options], check=True)
    try:
        assert (
            "cannot be written (Read-only file system); give a directory you may write to"
            in refusal(tmp_path)
        )
        with pytest.raises(
            UserError, match="metrics.jsonl: cannot be written .Read-only file system"
        ):
            MetricsWriter(tmp_path)
        assert workdir.read_config(str(tmp_path)) == Config() and read_metrics(tmp_path) == []
        workdir.check_record(tmp_path, {"sha256": "a"})
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# --- workdirs that go away --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "often", [("1", "0"), slow(("100000", "3"))], ids=["at a line", "at a checkpoint"]
)
def test_a_workdir_deleted_while_a_run_writes_there(source, tmp_path, often):
    run = tmp_path / "run"
    every = (f"--config.train.log_every={often[0]}", f"--config.checkpoint.every={often[1]}")
    process = uoe_process(*train_args(source, run, *ENDLESS, *every))
    if often[1] == "0":
        wait_for_step(run, 3, process)
    while often[1] != "0" and not list(run.glob("checkpoints/*/commit_success.txt")):
        assert process.poll() is None
        time.sleep(0.05)
    run.rename(tmp_path / "trash")
    shutil.rmtree(tmp_path / "trash", ignore_errors=True)
    gone = time.monotonic()
    ((code, _, err),) = finish([process], timeout=60)
    said = [line for line in err.splitlines() if line.startswith("uoe: ")]
    assert code == 1 and len(said) == 1 and str(run) in said[0] and "Traceback" not in err, err
    assert time.monotonic() - gone < 20
    if often[1] == "0":
        assert (
            f"{run}/metrics.jsonl: was deleted or replaced while the run was writing it; put the directory back, or"
            in said[0]
        )


def test_a_metrics_file_that_goes_away(tmp_path):
    for go in (
        lambda p: p.unlink(),
        lambda p: p.rename(p.parent / "old"),
        lambda p: (p.unlink(), p.write_text("")),
    ):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer.write(1, {"x": 1.0})
        writer.flush()
        go(tmp_path / "metrics.jsonl")
        for act in (lambda: writer.write(2, {"x": 1.0}), writer.flush, writer.close):
            with pytest.raises(RunError, match="metrics.jsonl: was deleted or replaced") as caught:
                act()
            assert caught.value.exit_code == 1
        writer.close()
