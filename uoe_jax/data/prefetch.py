"""Prefetch: a thread computes the next batches while the device works."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Computes fetch(start), fetch(start + 1), … stop - 1 in a daemon thread, up to `depth` ahead.

    Close it, or the thread stays behind with batches on the device. grain's prefetch iterators do
    not fit: they wait without limit for a fetch under way, also at exit; after an error they go on
    with the next step, or lose a SystemExit and wait for ever; and they hold one batch more.
    """

    def __init__(self, fetch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        self._fetch, self._steps, self._next = fetch, range(start, stop), start
        self._ready = queue.SimpleQueue[tuple[Any, BaseException | None]]()  # or what was raised
        self._room, self._closed = threading.Semaphore(depth), False
        self._error: BaseException | None = None  # raised by every `get` from now on
        self._thread = threading.Thread(target=self._work, name="uoe-prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """Waits for fetch(step) and raises what it raised, again at each call; takes every step."""
        if step >= self._steps.stop:
            raise IndexError(f"step {step} is not before stop={self._steps.stop}")
        if step != self._next:
            raise ValueError(f"step {step} was asked for, and {self._next} is next in order")
        if self._error is None:
            item, self._error = self._ready.get()
        if self._error is not None:
            raise self._error
        self._next += 1
        self._room.release()
        return item

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread and drops its batches; waits up to `timeout` s for a running fetch."""
        self._closed, self._error = True, RuntimeError("the prefetcher is closed")
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._ready.put((None, self._error))  # for a `get` that waits
        self._room.release()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self) -> None:
        for step in self._steps:
            self._room.acquire()  # before the fetch: `depth` batches besides the consumer's own
            if self._closed:
                return
            item, error = None, None
            try:
                item = self._fetch(step)
            except BaseException as raised:  # the consumer raises it, SystemExit included
                error = raised
            if self._closed:
                return
            self._ready.put((item, error))
            if error is not None:
                return
            del item  # no second reference while waiting
