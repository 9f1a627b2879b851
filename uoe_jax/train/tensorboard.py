"""TensorBoard files, a copy of metrics.jsonl for looking at."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

log = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes numbers under their key, and those of a flat list as key/<layer>.

    Strings and deeper lists are left out. Never raises: the first failure is logged and ends it.
    tensorboardX's SummaryWriter would block for ever once its thread has died of a full disk, so
    this uses the synchronous writer below it.

    Args:
      resume_step: the step of the checkpoint a run goes on from; later events are hidden.
    """

    def __init__(self, directory: epath.Path, resume_step: int | None) -> None:
        self._writer: Any = None
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

            self._events, self._summaries = event_pb2, summary_pb2
            directory.mkdir(parents=True, exist_ok=True)
            # The file name has whole seconds only: a quick restart would overwrite the file.
            suffix = f".{os.getpid()}.{time.time_ns()}"
            self._writer = EventsWriter(os.fspath(directory / "events"), suffix)
            first = 0 if resume_step is None else resume_step + 1
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(first, session_log=start)
        except Exception as error:
            self._give_up(error)

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
        self._writer = None

    def _event(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **what))

    def _attempt(self, do: Callable[[], object]) -> None:
        if self._writer is not None:
            try:
                do()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        message = "no more TensorBoard files (%s: %s); metrics.jsonl has everything"
        log.warning(message, type(error).__name__, error)


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in metrics.items():
        items = [(key, value)]
        if isinstance(value, list):
            items = [(f"{key}/{layer}", item) for layer, item in enumerate(value)]
        for tag, item in items:
            if isinstance(item, (int, float)):
                yield tag, float(item)
