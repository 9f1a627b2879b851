"""Several processes watch each other: where one is lost, fails or hangs, all stop soon, and each says which, where and why.

JAX alone notices a killed process after 100 s, waits 300 s for one that raised, and never notices one that hangs. Here
every process tells, through the coordination service, how far it is; process 0 reads that and gives the verdict, and the
others read the verdict and watch process 0. That costs each process a few small messages a second.
Daemon threads do it, which die with the process: whoever cannot run Python any more falls silent and counts as lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from uoe_jax import errors
from uoe_jax.config.schema import GuardConfig
from uoe_jax.distributed import coordination

T = TypeVar("T")

# Shares of guard.peer_timeout_s. Silence, a turn or two to see it, and the time for the others to read: together below 1.
_TURN, _SILENCE, _LINGER = 1 / 20, 0.7, 3 / 20
_SUSPICION = 3 / 20  # silence that is enough where a connection broke as well
_HOPELESS = (
    errors.EXIT_BAD_INPUT,
    errors.EXIT_BAD_NUMBERS,
)  # the others end with the same, so that no launcher tries again


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a process is.

    Attributes:
      moves: how many it has made; all processes make the same ones in the same order.
      patience_s: how long it may be there without progress; 0: for ever.
      ticks: how often it has made progress (`tick`), in all of its moves.
      waits: whether it does nothing but wait for another process.
    """

    moves: int = 0
    doing: str = "starting"
    step: int | None = None
    patience_s: float = 0.0
    ticks: int = 0
    waits: bool = False

    def __str__(self) -> str:
        return f"while {self.doing}" if self.step is None else f"at step {self.step} ({self.doing})"


class Watch:
    """Tells the others how far this process is, and ends it when one of them is lost, fails or hangs."""

    def __init__(
        self, client: Any, me: int, count: int, coordinator: str, guard: GuardConfig
    ) -> None:
        self._client, self._me, self._coordinator, self.guard = client, me, coordinator, guard
        self.place, self.ticks = Place(patience_s=guard.compile_timeout_s), 0
        self._silence = guard.peer_timeout_s * _SILENCE
        self._beat, self._ending, self._stopped = 0, threading.Lock(), False
        # Others write under `rest`, which process 0 reads; it writes under `lead`, which they read.
        self._own, self._theirs = ("uoe/lead", "uoe/rest") if me == 0 else ("uoe/rest", "uoe/lead")
        now, watched = time.monotonic(), range(1, count) if me == 0 else range(1)
        self._said = {
            i: (-1, Place(patience_s=guard.compile_timeout_s), now) for i in watched
        }  # beat, place, when it came
        self._lowest, self._answered = (-1, now), now
        self._ticks: dict[int, int] = {}  # of every process, when last looked at
        for work in (self._talk, self._judge):
            threading.Thread(
                target=self._turns, args=(work,), name=f"uoe{work.__name__}", daemon=True
            ).start()
        if me:
            _on_abort(self._aborted)

    def suspect(self) -> None:
        """A connection to another process broke: silence of a second or two now says which one is gone."""
        self._silence = min(self._silence, self.guard.peer_timeout_s * _SUSPICION)

    def stop(self) -> None:
        """Watches no more: the run is done."""
        self._stopped = True
        faulthandler.cancel_dump_traceback_later()

    def leave(self, exit_code: int, why: str) -> NoReturn:
        """Ends this process after an error, once the others can know of it.

        Not through Python's exit, where JAX would wait minutes for the others, who wait for this one in a collective.
        """
        self._ending.acquire(
            timeout=self.guard.peer_timeout_s
        )  # a verdict that is being told comes first
        code = exit_code if exit_code in _HOPELESS else errors.EXIT_LOST_PEER
        sentence = f"process {self._me} ended {self.place} with exit code {exit_code}{': ' * bool(why)}{why[:2000]}"
        try:
            self._tell(code, self._me, sentence)
        finally:
            _exit(exit_code)

    def where(self) -> Place:
        """How far this process is now."""
        return dataclasses.replace(self.place, ticks=self.ticks, waits=coordination.waits())

    def _tell(self, code: int, culprit: int, sentence: str) -> None:
        """Process 0 gives the verdict and stays until the others have read it; others tell process 0."""
        said = json.dumps({"code": code, "culprit": culprit, "why": sentence})
        self._client.key_value_set(f"{self._own}/verdict/{self._me}", said, allow_overwrite=True)
        if self._me == 0:
            time.sleep(self.guard.peer_timeout_s * _LINGER)

    def _turns(self, work: Any) -> None:
        while not self._stopped:
            work()
            time.sleep(self.guard.peer_timeout_s * _TURN)

    def _talk(self) -> None:
        """One exchange with the coordination service, which is in process 0; may block for ever where that is stopped."""
        # Where a C function keeps all threads of this process from running, one that needs no Python ends it.
        faulthandler.dump_traceback_later(3 * self.guard.peer_timeout_s, exit=True)
        if self._stopped:  # meanwhile
            return faulthandler.cancel_dump_traceback_later()
        self._beat += 1
        own = json.dumps({"beat": self._beat, "place": dataclasses.asdict(self.where())})
        try:
            self._client.key_value_set(f"{self._own}/alive/{self._me}", own, allow_overwrite=True)
            heard = self._client.key_value_dir_get(self._theirs)
        except Exception as error:
            if not self._stopped:
                first = str(error).strip().partition("\n")[0][:200]
                self._lost(0, f"the connection to it is gone ({first})")
            return
        self._answered = time.monotonic()
        for name, text in heard:
            kind, _, i = name.removeprefix(f"{self._theirs}/").partition("/")
            said = json.loads(text)
            if kind == "alive" and self._said[int(i)][0] != said["beat"]:
                self._said[int(i)] = (said["beat"], Place(**said["place"]), self._answered)
        for name, text in heard:
            if "/verdict/" in name:
                said = json.loads(text)
                if (
                    said["code"] in _HOPELESS
                ):  # mostly all were told in the course of things, and this one is leaving itself
                    time.sleep(self.guard.peer_timeout_s * _TURN)
                self._end(**said)

    def _judge(self) -> None:
        """Looks at what was heard, and when."""
        now = time.monotonic()
        if self._me and now - self._answered > self._silence:
            self._lost(0, f"it has not answered for {now - self._answered:.0f} s")
        for i, (_, _, since) in self._said.items():
            if now - since > self._silence:
                self._lost(i, f"it has not been heard for {now - since:.0f} s")
        if self._me == 0:
            self._find_hanging(now)

    def _find_hanging(self, now: float) -> None:
        """The run stands where its slowest process stands, and goes on where one that stands there makes progress.

        Of several there, the one hangs that does not wait for another.
        """
        at = {self._me: self.where()} | {i: place for i, (_, place, _) in self._said.items()}
        culprit = min(at, key=lambda i: (at[i].moves, at[i].waits))
        if (
            culprit != self._me
            and now - self._said[culprit][2] > self.guard.peer_timeout_s * _SUSPICION
        ):
            return  # one that falls silent as well does not hang, it is soon lost
        place, (moves, since) = at[culprit], self._lowest
        works = any(
            p.moves == place.moves and p.ticks > self._ticks.get(i, 0) for i, p in at.items()
        )
        self._ticks = {i: p.ticks for i, p in at.items()}
        if place.moves != moves or works:
            self._lowest = (place.moves, now)
        elif place.patience_s and now - since > place.patience_s:
            key = "compile" if place.patience_s == self.guard.compile_timeout_s else "hang"
            also = (
                ""
                if any(p.moves > moves for p in at.values())
                else ", and neither goes any other on"
            )
            why = f"nothing has happened there for {now - since:.0f} s{also} (config.guard.{key}_timeout_s)"
            self._end(errors.EXIT_LOST_PEER, culprit, f"process {culprit} hangs {place}: {why}")

    def _lost(self, i: int, why: str) -> None:
        place = self._said[i][1] if i in self._said else self.place
        self._end(errors.EXIT_LOST_PEER, i, f"process {i} was lost {place}: {why}")

    def _end(self, code: int, culprit: int, why: str) -> None:
        """The verdict, said and carried out; by the first thread that comes here."""
        if self._stopped or not self._ending.acquire(blocking=False):
            return
        again = "" if code in _HOPELESS else "; run the same command again"
        try:
            with contextlib.suppress(Exception):  # nobody may be there to read it
                print(f"uoe: {why}{again}", file=sys.stderr, flush=True)
                if culprit == self._me:
                    faulthandler.dump_traceback(all_threads=True)
            if self._me == 0:
                self._tell(code, culprit, why)
        finally:
            _exit(code)

    def _aborted(self, number: int) -> None:
        """JAX ends this process by SIGABRT, without a word to Python, once process 0 is gone; other reasons are a crash."""
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except OSError:
            self._lost(0, "its connections are closed")
            threading.Event().wait(self.guard.peer_timeout_s)  # another thread is saying so


def _exit(code: int) -> NoReturn:
    try:
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def _on_abort(handle: Any) -> None:
    """A handler that runs in the aborting thread at once: Python's own would wait for a main thread that never wakes."""
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # must stay alive
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


_abort_handler: Any = None
_watch: Watch | None = None


def start(guard: GuardConfig) -> None:
    """Begins to watch, where there are several processes; once they have met."""
    global _watch
    client, place = coordination.client(), coordination.cluster_from_env()
    if client is not None and place is not None:
        coordinator, count, me = place
        _watch = Watch(client, me, count, coordinator, guard)


def at(doing: str, step: int | None = None, slow: bool = False) -> None:
    """This process has come so far; where it does not go on from here in time, all stop.

    doing: as in "at step 7 (training)". slow: something is compiled, read or written first (guard.compile_timeout_s).
    All processes make the same calls in the same order.
    """
    if _watch is not None:
        patience = _watch.guard.compile_timeout_s if slow else _watch.guard.hang_timeout_s
        _watch.place = Place(_watch.place.moves + 1, doing, step, patience)


def tick() -> None:
    """The current move makes progress: a document was read, a block hashed, a tensor written. For any loop, as it costs nothing.

    Only for work that is done, never for waiting: a process that hangs must fall silent.
    """
    if _watch is not None:
        _watch.ticks += 1


def ticking(items: Iterable[T]) -> Iterator[T]:
    """The same items; each counts as progress."""
    for item in items:
        tick()
        yield item


def finish() -> None:
    """The end of a command that worked: the processes leave together, each still watched until all are here."""
    global _watch
    if _watch is not None:
        at("waiting for the others to end", slow=True)
        coordination.on_all(lambda: None)
        _watch.stop()
        _watch = None


def abort(exit_code: int, why: str = "") -> None:
    """Ends one of several processes after an error, and tells the others; returns where there is one process."""
    if _watch is not None:
        _watch.leave(exit_code, why)
    elif coordination.are_several():
        _exit(exit_code)


def abort_if_peer_lost(error: BaseException) -> None:
    """Ends one of several processes after an error that comes from another's end; returns where it does not."""
    said = coordination.lost_peer(error)
    if _watch is None or said is None:
        return
    _watch.suspect()
    time.sleep(
        _watch.guard.peer_timeout_s * 0.9
    )  # meanwhile the watch names the process that is gone, and ends this
    why = f"the connection to another process broke ({said})"
    with contextlib.suppress(Exception):
        print(f"uoe: {why}; run the same command again", file=sys.stderr)
    _watch.leave(errors.EXIT_LOST_PEER, why)
