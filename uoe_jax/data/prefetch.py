"""Prefetch: a thread computes the next batches while the device works."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Computes fetch(start), fetch(start + 1), … stop - 1 in a daemon thread, up to `depth` ahead.

    Use it as a context manager, or call `close`: else a thread stays behind that holds batches on
    the device. grain's prefetch iterators do not fit here. Their `close` (or the exit of the
    process) waits without limit for a fetch under way; after an error they go on with the next
    step, or repeat it but lose a SystemExit and wait for ever; and they hold one batch more.
    """

    def __init__(self, fetch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        self._fetch, self._depth = fetch, depth
        self._steps, self._next = range(start, stop), start
        self._ready: deque[tuple[Any, BaseException | None]] = deque()  # (item, what was raised)
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="uoe-prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """Waits for fetch(step) and raises what it raised, again at each call; takes every step."""
        with self._changed:
            if step >= self._steps.stop:
                raise IndexError(f"step {step} is not before stop={self._steps.stop}")
            if step != self._next:
                raise ValueError(f"step {step} was asked for, and {self._next} is next in order")
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            item, error = self._ready[0]
            if error is not None:
                raise error  # and stays at the head
            self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
        return item

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread and drops its batches; waits up to `timeout` s for a running fetch."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self) -> None:
        for step in self._steps:
            with self._changed:
                # Wait before the fetch: at most `depth` batches exist besides the consumer's own.
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            item, error = None, None
            try:
                item = self._fetch(step)
            except BaseException as raised:  # the consumer raises it, SystemExit included
                error = raised
            with self._changed:
                if self._closed:
                    return
                self._ready.append((item, error))
                self._changed.notify_all()
            if error is not None:
                return
            del item  # no second reference while waiting
