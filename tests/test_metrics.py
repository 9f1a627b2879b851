"""metrics.jsonl, TensorBoard, the progress line, and the signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import pty
import signal
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.distributed import coordination
from uoe_jax.errors import RunError, UserError
from uoe_jax.train.metrics import MetricsWriter, read_metrics
from uoe_jax.train.progress import Progress
from uoe_jax.train.signals import StopSignal


def lines(workdir: Path) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def refuse(token: str) -> None:
    raise AssertionError(f"{token} is not JSON")


def test_lines_are_exact_json(tmp_path):
    values = {
        "train/loss": 0.1 + 0.2,
        "single": np.float32(0.1),
        "jax": jnp.float32(1 / 3),
        "half": jnp.asarray([0.1, 2.0], jnp.bfloat16),
        "layers": np.asarray([[1e-300, 5e-324], [1.7976931348623157e308, -0.0]]),
        "dead": [0, 3],
        "bad": [math.nan, math.inf, -math.inf],
        "worse": np.float32("nan"),
        "eval/bits_per_byte": "n/a",
    }
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(5, values)
    text = lines(tmp_path)[0]  # before flush or close
    writer.close()
    writer.close()
    assert text.startswith(
        '{"step": 5, "train/loss": 0.30000000000000004, "single": 0.10000000149011612, '
    )
    assert json.loads(text, parse_constant=refuse)["bad"] == ["nan", "inf", "-inf"]
    (got,) = read_metrics(tmp_path)
    assert list(got) == ["step", *values]
    assert (
        got["single"] == float(np.float32(0.1))
        and got["half"] == [0.10009765625, 2.0]
        and got["dead"] == [0, 3]
    )
    assert np.asarray(got["layers"]).tobytes() == values["layers"].tobytes()
    assert (
        math.isnan(got["worse"])
        and math.isnan(got["bad"][0])
        and got["bad"][1:] == [math.inf, -math.inf]
    )
    assert got["eval/bits_per_byte"] == "n/a"


def test_what_cannot_be_written_is_refused(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for bad in (None, {"a": 1.0}, 1j, [object()]):
        with pytest.raises(TypeError, match="train/x"):
            writer.write(1, {"train/x": bad})
    with pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2})
    writer.close()
    assert lines(tmp_path) == []


def run(workdir: Path, first: int, last: int, resume_step: int | None) -> MetricsWriter:
    """Writes steps first..last-1, an evaluation and a training line each, as a run would."""
    writer = MetricsWriter(workdir, resume_step)
    for step in range(first, last):
        writer.write(step, {"eval/loss": math.sin(step)})
        writer.write(step, {"train/loss": math.cos(step), "balance": [math.exp(-step), math.nan]})
    return writer


def test_resume_gives_the_same_file(tmp_path):
    run(tmp_path / "whole", 0, 12, None).close()
    run(tmp_path / "cut", 0, 9, None)  # killed: never closed
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "train/lo')  # torn, though its step would be kept
    run(tmp_path / "cut", 7, 12, resume_step=6).close()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()
    assert [p.name for p in (tmp_path / "cut").iterdir() if "tmp" in p.name] == []


def test_a_line_without_its_end_is_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 1.0}\n\0\0\0\0\n[1]\n{"x": 2}\n{"step": 2, "x": 1.0}')
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1.0}]
    writer = MetricsWriter(tmp_path, resume_step=10, tensorboard=False)
    writer.write(2, {"x": 3.0})
    assert lines(tmp_path) == ['{"step": 1, "x": 1.0}', '{"step": 2, "x": 3.0}']


def test_the_cut_is_atomic(tmp_path, monkeypatch):
    run(tmp_path, 0, 5, None).close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(
        os,
        "fsync",
        lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_fresh_run_empties_and_whole_file_is_left_alone(tmp_path):
    run(tmp_path, 0, 5, None).close()
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsWriter(tmp_path, resume_step=4).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == inode and len(lines(tmp_path)) == 10
    MetricsWriter(tmp_path).close()
    assert lines(tmp_path) == []


def test_errors_are_sentences(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written .*--workdir"):
        MetricsWriter(tmp_path / "file")
    with pytest.raises(UserError, match="no metrics here"):
        read_metrics(tmp_path)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer._file._file, writer._file._path = open("/dev/full", "ab"), "/dev/full"
    with pytest.raises(RunError, match="metrics.jsonl: a line could not be written .No space left"):
        writer.write(1, {"x": 1.0})


def events(workdir: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar; a start of session as (step, "START", 0)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # length 8, its checksum 4, the event, its checksum 4
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "START", 0.0))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(
        1,
        {
            "loss": 2.0,
            "layers": [1.0, 2.0],
            "experts": [[1.0], [2.0]],
            "text": "n/a",
            "bad": math.nan,
            "half": [math.inf, 3.0],
        },
    )
    writer.close()
    first = [
        (0, "START", 0.0),
        (1, "loss", 2.0),
        (1, "layers/0", 1.0),
        (1, "layers/1", 2.0),
        (1, "half/1", 3.0),
    ]
    assert events(tmp_path) == first
    writer = MetricsWriter(tmp_path, resume_step=7)
    writer.write(8, {"loss": 1.0})
    writer.close()
    assert events(tmp_path) == [*first, (8, "START", 0.0), (8, "loss", 1.0)]


def test_a_failing_tensorboard_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(tmp_path)
        for step in range(100):  # SummaryWriter would block at the tenth
            writer.write(step, {"loss": 1.0})
        writer.close()
    assert len(lines(tmp_path)) == 100
    assert [
        r.message
        for r in caplog.records
        if "TensorBoard" in r.message and "metrics.jsonl" in r.message
    ] != []
    assert len(caplog.records) == 1


def test_tensorboard_fails_on_the_way(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer._tensorboard._writer._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)
    for step in range(100):
        writer.write(step, {"loss": 1.0})
        writer.flush()
    writer.close()
    assert (
        len(lines(tmp_path)) == 100
        and len([r for r in caplog.records if "no more TensorBoard" in r.message]) == 1
    )


def show(stream) -> None:
    progress = Progress(200, start=100, stream=stream)
    progress.update(101, 3.25, "1.5000 bits per byte", 12345.6)
    progress.print("saved step 101")
    progress.update(150, math.nan, "nan bits per byte", 1e6)
    progress.close()
    progress.close()


def test_progress_in_a_pipe():
    stream = io.StringIO()
    show(stream)
    text = stream.getvalue()
    assert "\r" not in text and "\x1b" not in text
    first, said, second = text.splitlines()
    assert first == "step 101/200  loss 3.2500  1.5000 bits per byte  12,346 tokens/s"
    assert said == "saved step 101"
    assert second == "step 150/200  loss nan  nan bits per byte  1,000,000 tokens/s  0:00:00 left"


def test_compilation_and_long_evaluations_are_shown(monkeypatch):
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("uoe_jax.train.progress.time.monotonic", lambda: now[0])
    progress = Progress(0, stream=stream)
    with progress.compiling("the train step"):
        now[0] = 12.34
    for done in range(1, 101):
        now[0] += 0.25
        progress.count("evaluation", done, 400)
    assert stream.getvalue().splitlines() == [
        "compiling the train step …",
        "compiled the train step in 12.3 s",
        "evaluation: 41 of 400 batches, 1:30 left",
        "evaluation: 81 of 400 batches, 1:20 left",
    ]
    Progress(9, stream=stream, silent=True).print("nothing")
    assert "nothing" not in stream.getvalue()


def in_a_terminal() -> str:
    """What show() writes to a terminal of 120 columns."""
    import fcntl
    import struct
    import termios

    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    with os.fdopen(other, "w") as stream:
        show(stream)
    parts = []
    with contextlib.suppress(OSError):  # EIO: all is read and the other end is closed
        while part := os.read(main, 4096):
            parts.append(part)
    os.close(main)
    return b"".join(parts).decode()


def test_progress_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = in_a_terminal()
    last = text.rstrip("\r\n").split("\r")[-1]
    assert (
        "step 150/200" in last
        and "1,000,000 tokens/s" in last
        and "loss nan" in last
        and "left" in last
    )
    assert text.count("\n") == 2  # what was said, and the end: the bar itself stays on one line
    assert "saved step 101\r\n" in text
    monkeypatch.setenv("TERM", "dumb")
    assert in_a_terminal().count("\n") == 3


def test_first_signal_asks_second_interrupt_insists():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        with StopSignal() as stop:
            assert stop.requested is None
            signal.raise_signal(getattr(signal, name))
            signal.raise_signal(signal.SIGTERM)  # schedulers repeat themselves
            assert stop.requested == name
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_one_of_several_processes_turns_signals_to_the_preemption_service(monkeypatch):
    """Which waits for SIGTERM with a handler of its own, that must stay; and says when all are to stop."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    monkeypatch.setattr(coordination, "are_several", lambda: True)
    monkeypatch.setattr(coordination, "preempted", lambda call: call == 1)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGUSR1)
            assert got == [signal.SIGTERM] and stop.requested == "SIGUSR1"
            assert [stop.should_stop() for _ in range(3)] == [False, True, True]
            signal.raise_signal(signal.SIGUSR1)
            assert got == [signal.SIGTERM]  # once is enough
    finally:
        signal.signal(signal.SIGTERM, before)


def test_signals_do_nothing_in_another_thread():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with StopSignal() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
