"""TensorBoard files, a copy of metrics.jsonl for looking at."""

import logging
import os
import time
from typing import Any, Callable, Iterator, Mapping

from etils import epath

log = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes numbers under their key, and those of a flat list as key/<layer>.

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
