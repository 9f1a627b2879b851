"""What a run tells: `metrics.jsonl` (the record), TensorBoard files (a copy for looking at) and the progress line.

A line of metrics.jsonl is one JSON object, "step" first. Values are numbers, strings, or (nested) lists of them, one
entry a layer. JSON has no NaN: the non-finite floats are the strings "nan", "inf" and "-inf", which `float()` reads
back and `read_metrics` restores. Finite floats are written as Python's repr, so equal files mean equal bits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from etils import epath

from uoe_jax.errors import RunError, UserError
from uoe_jax.workdir import is_remote, locate, os_errors

log = logging.getLogger(__name__)

UPLOAD_EVERY_S = 60
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`. Only process 0 may make one.

    A line reaches the operating system before write() returns, so a killed process tears no line but the one it is
    writing; flush() makes it survive a power cut. On gs:// the lines reach the storage with flush() and otherwise once a
    minute, as the whole object is uploaded. Before a checkpoint of step s is saved, the metrics of every step up
    to s must have been written and flushed: what is missing then is missing for ever.

    Args:
      workdir: the run's directory; made if it is not there.
      resume_step: the step of the checkpoint the run goes on from. Lines of later steps, and a torn last line, are cut
        off (atomically). None for a fresh run: the file is emptied.
      owed: the evaluation of `resume_step` is cut off as well, as it is done again.
      tensorboard: whether to write TensorBoard files. When they fail, a warning is logged and the run goes on.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], resume_step: int | None = None, tensorboard: bool = True,
        owed: bool = False,
    ) -> None:  # fmt: skip
        root = locate(workdir)
        self.path = root / "metrics.jsonl"
        try:
            last = -1 if resume_step is None else resume_step
            self._file = (_Object if is_remote(root) else _File)(self.path, last, owed)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self.path}: cannot be written ({reason}); choose another --workdir"
            ) from error
        self._tensorboard = _TensorBoard(root / "tensorboard", resume_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line. Scalars and arrays of numpy or jax are taken too (and waited for).

        Raises:
          RunError: the line could not be written (disk full), or the file was deleted.
          ValueError, TypeError: a key "step", or a value that is neither number, string nor list of them.
        """
        if "step" in metrics:
            raise ValueError('metrics: the key "step" is the writer\'s own')
        plain = {key: _plain(key, value) for key, value in metrics.items()}
        with self._failing():
            self._file.write(
                json.dumps({"step": int(step), **plain}, allow_nan=False).encode() + b"\n"
            )
        if self._tensorboard:
            self._tensorboard.write(int(step), plain)

    def flush(self) -> None:
        """Everything written so far is on the disk, or uploaded, when this returns."""
        with self._failing():
            self._file.sync()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes both; safe to call twice."""
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path}: a line could not be written ({error.strerror or error}); "
                "fix that and run the same command again"
            ) from error


class _File:
    """metrics.jsonl on a file system. All methods raise OSError; RunError where the file is no longer the one it was."""

    def __init__(self, path: epath.Path, last_step: int, owed: bool) -> None:
        self._path, self.closed = path, False
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, last_step, owed)
        self._file = path.open("ab")

    def write(self, line: bytes) -> None:
        self._check()
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        self._check()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self) -> None:
        """A deleted file takes lines for ever, and nobody will read them."""
        try:
            same = os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise RunError(
                f"{self._path}: was deleted or replaced while the run was writing it; put the directory back, or "
                "start again in another --workdir"
            )

    def close(self) -> None:
        self.closed = True
        with contextlib.suppress(OSError):  # of a last flush; what is missing was told before
            self._file.close()


class _Object:
    """metrics.jsonl on gs://, where nothing can be appended: all of it is kept here, and uploaded. Raises OSError."""

    def __init__(self, path: epath.Path, last_step: int, owed: bool) -> None:
        self._path, self.closed = path, False
        with os_errors(path):
            data = path.read_bytes() if path.exists() else b""
        self._data = bytearray(_kept(data, last_step, owed))
        self._new = self._data != data
        self._uploaded = time.monotonic()

    def write(self, line: bytes) -> None:
        self._data += line
        self._new = True
        if time.monotonic() - self._uploaded > UPLOAD_EVERY_S:
            try:
                self.sync()
            except OSError as error:  # before a checkpoint it must succeed, and here it need not
                self._uploaded = time.monotonic()
                log.warning("%s: could not be uploaded now (%s)", self._path, error)

    def sync(self) -> None:
        if self._new:
            with os_errors(self._path):
                self._path.write_bytes(bytes(self._data))
            self._new, self._uploaded = False, time.monotonic()

    def close(self) -> None:
        self.closed = True


class Silent:
    """Stands for a MetricsWriter and for a Progress in the processes that tell nothing."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def update(self, step: int, loss: float, said: str, tokens_per_second: float | None) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `<workdir>/metrics.jsonl` as dicts, "nan" and "inf" as floats again; a torn last line is left out.

    Raises:
      UserError: there is no such file, or it cannot be read.
    """
    path = locate(workdir) / "metrics.jsonl"
    try:
        with os_errors(path):
            data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there are no metrics here; check --workdir") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); fix that, or check --workdir"
        ) from error
    return [{key: _restore(value) for key, value in record.items()} for _, record in _records(data)]


def _records(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole, readable lines of a metrics file with what they say."""
    for line in data.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:  # a torn line, or zeros after a power cut
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _kept(data: bytes, last_step: int, owed: bool) -> bytes:
    """The whole lines of a metrics file up to `last_step`; owed: without the evaluation of that step."""

    def stays(record: dict[str, Any]) -> bool:
        again = (
            owed and record["step"] == last_step and any(key.startswith("eval/") for key in record)
        )
        return record["step"] <= last_step and not again

    return b"".join(line for line, record in _records(data) if stays(record))


def _cut(path: epath.Path, last_step: int, owed: bool) -> None:
    """Leaves of a metrics file what is `_kept`; the old file or the new one, never half of it."""
    data = path.read_bytes() if path.exists() else b""
    kept = _kept(data, last_step, owed)
    if kept == data:
        return
    temporary = path.parent / (path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(key: str, value: Any) -> Any:
    """A value as JSON can hold it: int, float, str or lists of them; non-finite floats as strings."""
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    if hasattr(
        value, "tolist"
    ):  # numpy and jax; bfloat16 stays itself in tolist and is a float to float()
        value = value.tolist()
        return _plain(key, value if isinstance(value, (str, bool, int, list)) else float(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    raise TypeError(
        f"metrics: {key} is a {type(value).__name__}; numbers, strings and lists of them can be written"
    )


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class _TensorBoard:
    """Scalars for TensorBoard: numbers under their key, a flat list as key/<layer>; strings and deeper lists are left
    out, and so are non-finite numbers (metrics.jsonl has them).

    tensorboardX's SummaryWriter hands events to a thread over a queue of ten and blocks for ever once the thread has
    died of a full disk, so this uses the synchronous writer below it. Never raises: the first failure is logged and
    ends it.
    """

    def __init__(self, directory: epath.Path, resume_step: int | None) -> None:
        self._writer = None
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

            self._pb, self._summary = event_pb2, summary_pb2
            directory.mkdir(parents=True, exist_ok=True)
            # The file name has whole seconds only: a quick restart would overwrite the file before it.
            self._writer = EventsWriter(
                os.fspath(directory / "events"), f".{os.getpid()}.{time.time_ns()}"
            )
            purge = (
                0 if resume_step is None else resume_step + 1
            )  # TensorBoard hides older events from here on
            self._event(purge, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        except Exception as error:
            self._give_up(error)

    def _event(self, step: int, **what: Any) -> None:
        assert self._writer is not None
        self._writer.write_event(self._pb.Event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, plain: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            scalars = [
                self._summary.Summary.Value(tag=tag, simple_value=value)
                for tag, value in _scalars(plain)
            ]
            self._event(step, summary=self._summary.Summary(value=scalars))
        except Exception as error:
            self._give_up(error)

    def flush(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)
        self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        log.warning(
            "no more TensorBoard files (%s: %s); metrics.jsonl has everything",
            type(error).__name__,
            error,
        )


def _scalars(plain: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in plain.items():
        for tag, item in (
            [(key, value)]
            if not isinstance(value, list)
            else [(f"{key}/{layer}", item) for layer, item in enumerate(value)]
        ):
            if isinstance(item, (int, float)):
                yield tag, float(item)


class Progress:
    """Step, loss, the task's other measures, tokens a second and time left: a bar in a terminal, a line a call anywhere else.

    Args:
      total: the step at which the run is done.
      start: steps done before this process began.
      stream: where to write; sys.stderr by default. No carriage return or escape goes to anything but a terminal.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = total
        self._first: tuple[float, int] | None = (
            None  # time and step of the first update: before it, compilation
        )
        self._bar = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}|{postfix}",
            )

    def update(self, step: int, loss: float, said: str, tokens_per_second: float | None) -> None:
        """Shows the state after `step` steps; said: the task's other measures; None: not known yet."""
        facts = [f"loss {loss:.4f}", said]
        if tokens_per_second is not None:
            facts.append(f"{tokens_per_second:,.0f} tokens/s")
        if left := self._time_left(step):
            facts.append(f"{left} left")
        if self._bar is None:
            self.say(f"step {step}/{self._total}  " + "  ".join(facts))
        else:
            self._bar.set_postfix_str("  ".join(facts), refresh=False)
            self._bar.update(step - self._bar.n)

    def _time_left(self, step: int) -> str:
        """Empty where it is not known yet."""
        now = time.monotonic()
        if self._first is None or step <= self._first[1]:
            self._first = (now, step)
            return ""
        start, first = self._first
        seconds = round((now - start) / (step - first) * max(self._total - step, 0))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
