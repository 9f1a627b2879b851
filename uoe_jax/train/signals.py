"""Signals that ask a run to stop, noticed between two steps."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Self

from uoe_jax.distributed import coordination


class StopSignal:
    """In its `with` block, SIGINT, SIGTERM and SIGUSR1 set `requested` and do not end the process.

    Call `should_stop()` at every step and every batch of an evaluation. A second SIGINT raises
    KeyboardInterrupt at once. Outside the main thread Python allows no handlers, and this does
    nothing. Of several processes one is signalled, and all must stop at the same step. JAX's
    preemption service does that: it waits for SIGTERM, and a handler for it would silently end the
    service. So there the other signals are turned into SIGTERM.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the name of the first signal
        self._shared, self._stop = coordination.are_several(), False
        self._calls = self._interrupts = 0  # calls: the same number in all processes
        self._restore = contextlib.ExitStack()

    def should_stop(self) -> bool:
        """Whether to stop here; several processes return True from the same call on."""
        if not self._shared:
            return self.requested is not None
        if not self._stop:
            self._stop = coordination.preempted(self._calls)
            self._calls += 1
        return self._stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.requested is None
        self.requested = self.requested or signal.Signals(number).name
        if self._shared and first:
            os.kill(os.getpid(), signal.SIGTERM)
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and self._interrupts > 1:
            raise KeyboardInterrupt
        if first:  # not print, which may be what was interrupted
            again = " (again: at once)" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"uoe: {self.requested}: saving, then stopping{again}\n".encode())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            own = () if self._shared else (signal.SIGTERM,)
            for number in (signal.SIGINT, signal.SIGUSR1, *own):
                old = signal.signal(number, self._handle)
                # None: the old handler was not Python's and cannot be restored from here.
                self._restore.callback(signal.signal, number, old or signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()
