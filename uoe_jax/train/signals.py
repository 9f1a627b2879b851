"""A wish to stop, noticed between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any, Callable

from uoe_jax.distributed import coordination


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set `requested` instead of ending the process.

    `due()` says whether to stop now, and is to be asked at every step and every batch of an evaluation; the run then saves
    and leaves with EXIT_STOPPED. A second SIGINT raises KeyboardInterrupt at once, for who does not want to wait; more of
    the others change nothing. The old handlers come back on exit. Outside the main thread Python allows no handlers: there
    it does nothing.

    Of several processes one is signalled, and all must stop at the same point. That is what JAX's preemption service is
    for: it waits for SIGTERM, and a handler for it would silently end the service. So there the others are turned to it.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the name of the first signal
        self._shared = coordination.are_several()
        self._asked = 0  # a number that is the same in all processes
        self._due = False
        self._interrupts = 0
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def due(self) -> bool:
        """Whether to stop here; of several processes, all say so in the same one of their calls, and from then on."""
        if self._shared and not self._due:
            self._due = coordination.preempted(self._asked)
            self._asked += 1
        return self._due if self._shared else self.requested is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = (
            self.requested is None,
            self.requested or signal.Signals(number).name,
        )
        if self._shared and first:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        if first:  # not print, which may be what was interrupted
            again = " (again: at once)" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(2, f"uoe: {self.requested}: saving, then stopping{again}\n".encode())

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGUSR1") if self._shared else ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            # None: the old handler was not Python's and cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()
