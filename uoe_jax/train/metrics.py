"""`metrics.jsonl`, the record of a run: written line by line, cut at a resume, read back.

A line is one JSON object, "step" first. Values are numbers, strings, or (nested) lists of them, one
entry a layer. JSON has no NaN: non-finite floats are the strings "nan", "inf" and "-inf", which
`read_metrics` restores. Finite floats are written as Python's repr, so equal files mean equal bits.
"""

import contextlib
import json
import logging
import math
import os
import time
from typing import Any, Callable, Iterator, Mapping

from etils import epath

from uoe_jax.errors import AGAIN, RunError, UserError, os_error_as
from uoe_jax.workdir import is_remote, locate, os_errors, write_text

log = logging.getLogger(__name__)
UPLOAD_EVERY_S = 60
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsWriter:
    """Appends to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`; in process 0 only.

    A line reaches the operating system before write() returns; flush() makes it survive a power
    cut. On gs:// the whole object is uploaded, with flush() and otherwise once a minute. Before a
    checkpoint of step s is saved, the metrics up to s must have been written and flushed: a resume
    never writes them again.

    resume_step: of the checkpoint the run goes on from; lines of later steps and a torn last line
    are cut off (atomically). None: a fresh run, whose file is emptied. owed: the evaluation of
    `resume_step` is cut off as well, as it is done again.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None = None,
        tensorboard: bool = True,
        owed: bool = False,
    ) -> None:
        root = locate(workdir)
        self.path = root / "metrics.jsonl"
        problem, remedy = f"{self.path}: cannot be written", "choose another --workdir"
        with os_error_as(UserError, problem, remedy), os_errors(self.path):
            data = self.path.read_bytes() if self.path.exists() else b""
            kept = _cut(data, -1 if resume_step is None else resume_step, owed)
            self._file = (_Object if is_remote(root) else _File)(self.path, data, kept)
        self._closed, board = False, root / "tensorboard"
        self._tensorboard = TensorBoardWriter(board, resume_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line. Scalars and arrays of numpy or jax are accepted (and waited for)."""
        if "step" in metrics:
            raise ValueError('metrics: the key "step" is the writer\'s own')
        plain = {key: _plain(key, value) for key, value in metrics.items()}
        line = json.dumps({"step": int(step), **plain}, allow_nan=False)
        with os_error_as(RunError, f"{self.path}: a line could not be written", AGAIN):
            self._file.write(line.encode() + b"\n")
        if self._tensorboard:
            self._tensorboard.write(int(step), plain)

    def flush(self) -> None:
        """Puts everything written so far on the disk, or uploads it."""
        with os_error_as(RunError, f"{self.path}: a line could not be written", AGAIN):
            self._file.sync()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flushes and closes both; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()


class NullWriter:
    """A MetricsWriter that writes nothing, for all processes but process 0."""

    def write(self, *_: object) -> None:
        pass

    flush = close = write


class _File:
    """metrics.jsonl on a file system. Raises OSError; RunError where the file was replaced."""

    def __init__(self, path: epath.Path, old: bytes, kept: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kept != old:
            write_text(path, kept.decode())
        self._path, self._file = path, path.open("ab")

    def write(self, line: bytes) -> None:
        self._check()
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        self._check()
        os.fsync(self._file.fileno())

    def _check(self) -> None:
        """A deleted file accepts lines for ever, and nobody would read them."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        problem = "was deleted or replaced while the run was writing it"
        remedy = "put the directory back, or start again in another --workdir"
        raise RunError(f"{self._path}: {problem}; {remedy}")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a last flush; reported before
            self._file.close()


class _Object:
    """metrics.jsonl on gs://: kept in memory, and uploaded whole. Raises OSError."""

    def __init__(self, path: epath.Path, old: bytes, kept: bytes) -> None:
        self._path, self._data = path, bytearray(kept)
        self._changed, self._uploaded = kept != old, time.monotonic()

    def write(self, line: bytes) -> None:
        self._data += line
        self._changed = True
        if time.monotonic() - self._uploaded > UPLOAD_EVERY_S:
            try:
                self.sync()
            except OSError as error:  # only before a checkpoint it must succeed
                self._uploaded = time.monotonic()
                log.warning("%s: could not be uploaded now (%s)", self._path, error)

    def sync(self) -> None:
        if self._changed:
            with os_errors(self._path):
                self._path.write_bytes(bytes(self._data))
            self._changed, self._uploaded = False, time.monotonic()

    def close(self) -> None:
        pass


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `<workdir>/metrics.jsonl` as dicts; a torn last line is left out."""
    path, remedy = locate(workdir) / "metrics.jsonl", "fix that, or check --workdir"
    with os_error_as(UserError, f"{path}: cannot be read", remedy), os_errors(path):
        if not path.exists():
            raise UserError(f"{path}: there are no metrics here; check --workdir")
        data = path.read_bytes()
    return [{key: _restore(value) for key, value in record.items()} for _, record in _records(data)]


def _records(data: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The complete lines of a metrics file with their content."""
    for line in data.splitlines(keepends=True):
        with contextlib.suppress(ValueError):  # a torn line, or zeros after a power cut
            record = json.loads(line.decode("utf-8-sig")) if line.endswith(b"\n") else None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def _cut(data: bytes, last_step: int, owed: bool) -> bytes:
    """The complete lines of a metrics file up to `last_step`; owed: without its evaluation."""
    kept = []
    for line, record in _records(data):
        again = owed and record["step"] == last_step and any(k.startswith("eval/") for k in record)
        if record["step"] <= last_step and not again:
            kept.append(line)
    return b"".join(kept)


def _plain(key: str, value: Any) -> Any:
    """A value as JSON can hold it; non-finite floats as strings."""
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(key, item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax; a bfloat16 stays itself in tolist
        value = value.tolist()
        return _plain(key, value if isinstance(value, (str, bool, int, list)) else float(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    remedy = "numbers, strings and lists of them can be written"
    raise TypeError(f"metrics: {key} is a {type(value).__name__}; {remedy}")


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


class TensorBoardWriter:
    """A copy for TensorBoard: numbers under their key, those of a flat list as key/<layer>.

    Strings and deeper lists are left out. Never raises: the first failure is logged and ends it.
    tensorboardX's SummaryWriter would block for ever once its thread has died of a full disk, so
    this uses the synchronous writer below it. Earlier events after `resume_step` are hidden.
    """

    def __init__(self, directory: epath.Path, resume_step: int | None) -> None:
        self._failed = False

        def start() -> None:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

            self._events, self._summaries = event_pb2, summary_pb2
            directory.mkdir(parents=True, exist_ok=True)
            # The file name has whole seconds only: a quick restart would overwrite the file.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._writer = EventsWriter(os.fspath(directory / "events"), suffix)
            first = 0 if resume_step is None else resume_step + 1
            log_start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(first, session_log=log_start)

        self._attempt(start)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: as `metrics` writes them, plain JSON."""

        def do() -> None:
            value = self._summaries.Summary.Value
            values = [value(tag=tag, simple_value=x) for tag, x in _scalars(metrics)]
            self._event(step, summary=self._summaries.Summary(value=values))

        self._attempt(do)

    def flush(self) -> None:
        self._attempt(lambda: self._writer.flush())

    def close(self) -> None:
        self._attempt(lambda: self._writer.close())

    def _event(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))

    def _attempt(self, do: Callable[[], object]) -> None:
        if not self._failed:
            try:
                do()
            except Exception as error:
                self._failed = True
                message = "no more TensorBoard files (%s: %s); metrics.jsonl has everything"
                log.warning(message, type(error).__name__, error)


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        items = {key: value}
        if isinstance(value, list):
            items = {f"{key}/{layer}": item for layer, item in enumerate(value)}
        yield from ((tag, float(x)) for tag, x in items.items() if isinstance(x, (int, float)))
