"""A wish to stop, noticed between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `requested` instead of ending the process.

    `requested` is None, then the name of the first signal ("SIGTERM"); the loop looks at it once a step, saves and
    leaves with EXIT_STOPPED. A second SIGINT raises KeyboardInterrupt at once, for who does not want to wait. The old
    handlers come back on exit. Outside the main thread Python allows no handlers: there it does nothing.

    Not after jax.distributed.initialize with the default names: a handler for SIGTERM put in afterwards silently ends
    JAX's own preemption service. Pass names=("SIGINT",) there and ask that service.
    """

    def __init__(self, names: tuple[str, ...] = ("SIGINT", "SIGTERM", "SIGUSR1")) -> None:
        self.requested: str | None = None
        self._names = names
        self._interrupts = 0
        self._old: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in self._names:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: the old handler was not Python's and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()
