"""Watchdog of several processes: if one is lost, fails or hangs, all stop and say which and why.

JAX alone notices a killed process after 100 s, waits 300 s for one that raised, and never notices
one that hangs. Here every process publishes a heartbeat through the coordination service, a few
small messages a second: the phase of the run it is in, and its progress there. Process 0 reads the
heartbeats and gives the verdict; the others read the verdict and watch process 0. Daemon threads do
it: a process that cannot run Python any more falls silent and counts as lost.
"""

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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

from uoe_jax.config.schema import GuardConfig
from uoe_jax.distributed import coordination
from uoe_jax.errors import EXIT_BAD_INPUT, EXIT_BAD_NUMBERS, EXIT_LOST_PEER
from uoe_jax.runtime_env import notice

T = TypeVar("T")

# Shares of guard.peer_timeout_s: the period of the threads, the silence that means a lost process,
# and the time that process 0 stays for the others to read its verdict. Together below 1.
_PERIOD, _SILENCE, _LINGER = 1 / 20, 0.7, 3 / 20
_SUSPICION = 3 / 20  # the silence that is enough where a connection broke as well
# With these codes all processes end, so that no launcher tries again.
_FINAL_CODES = (EXIT_BAD_INPUT, EXIT_BAD_NUMBERS)


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a process is."""

    phases: int = 0  # entered so far; all processes enter the same ones in the same order
    phase: str = "starting"  # the current one
    step: int | None = None
    timeout_s: float = 0.0  # how long the phase may last without progress; 0: for ever
    progress: int = 0  # how often progress was made (`tick`), in all phases
    waiting: bool = False  # whether the process does nothing but wait for another one

    def __str__(self) -> str:
        return f"while {self.phase}" if self.step is None else f"at step {self.step} ({self.phase})"


class Heartbeat(NamedTuple):
    """The newest one of another process."""

    number: int
    status: Status
    received: float  # time.monotonic() here


class Watchdog:
    """Publishes this process's heartbeat, and ends it when another one is lost, fails or hangs."""

    def __init__(self, client: Any, cluster: tuple[str, int, int], guard: GuardConfig) -> None:
        self._coordinator, count, me = cluster
        self._client, self._me, self.guard = client, me, guard
        self.status, self.progress = Status(timeout_s=guard.compile_timeout_s), 0
        self.max_silence = guard.peer_timeout_s * _SILENCE
        self._beats, self._ending, self.stopped = 0, threading.Lock(), False
        # Process 0 writes below `lead`, which the others read; they write below `rest`.
        self._own, self._others = ("uoe/lead", "uoe/rest") if me == 0 else ("uoe/rest", "uoe/lead")
        now, watched = time.monotonic(), range(1, count) if me == 0 else range(1)
        self._heartbeats = {i: Heartbeat(-1, self.status, now) for i in watched}
        self._last: Any = None  # (phases of the slowest process, {process there: its progress})
        self._since, self._answered = now, now
        for work in (self._exchange, self._judge):
            name = f"uoe{work.__name__}"
            threading.Thread(target=self._repeat, args=(work,), name=name, daemon=True).start()
        if me:
            _on_abort(self._aborted)

    def abort(self, exit_code: int, why: str) -> NoReturn:
        """Ends this process once the others can know why; Python's exit would wait for them."""
        self._ending.acquire(timeout=self.guard.peer_timeout_s)  # a verdict under way comes first
        code = exit_code if exit_code in _FINAL_CODES else EXIT_LOST_PEER
        detail = f": {why[:2000]}" if why else ""
        sentence = f"process {self._me} ended {self.status} with exit code {exit_code}{detail}"
        try:
            self._publish_verdict(code, self._me, sentence)
        finally:
            _exit(exit_code)

    def current(self) -> Status:
        waiting = coordination.waiting
        return dataclasses.replace(self.status, progress=self.progress, waiting=waiting)

    def _publish_verdict(self, code: int, culprit: int, sentence: str) -> None:
        """Of process 0 to all, which then stays until they have read it; of others to process 0."""
        text = json.dumps({"code": code, "culprit": culprit, "why": sentence})
        self._client.key_value_set(f"{self._own}/verdict/{self._me}", text, allow_overwrite=True)
        if self._me == 0:
            time.sleep(self.guard.peer_timeout_s * _LINGER)

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self.stopped:
            work()
            time.sleep(self.guard.peer_timeout_s * _PERIOD)

    def _exchange(self) -> None:
        """One exchange with the coordination service in process 0; may block if that is stopped."""
        # Ends this process where a C function keeps all of its Python threads from running.
        faulthandler.dump_traceback_later(3 * self.guard.peer_timeout_s, exit=True)
        if self.stopped:  # meanwhile
            return faulthandler.cancel_dump_traceback_later()
        self._beats += 1
        own = json.dumps({"beat": self._beats, "status": dataclasses.asdict(self.current())})
        try:
            self._client.key_value_set(f"{self._own}/alive/{self._me}", own, allow_overwrite=True)
            received = self._client.key_value_dir_get(self._others)
        except Exception as error:
            if not self.stopped:
                first = str(error).strip().partition("\n")[0][:200]
                self._lost(0, f"the connection to it is gone ({first})")
            return
        self._answered = time.monotonic()
        for name, text in received:
            kind, _, i = name.removeprefix(f"{self._others}/").partition("/")
            message = json.loads(text)
            if kind == "verdict":
                if message["code"] in _FINAL_CODES:  # mostly this process ends with it by itself
                    time.sleep(self.guard.peer_timeout_s * _PERIOD)
                self._end(**message)
            elif self._heartbeats[int(i)].number != message["beat"]:
                status = Status(**message["status"])
                self._heartbeats[int(i)] = Heartbeat(message["beat"], status, self._answered)

    def _judge(self) -> None:
        """Looks for processes that are silent, and in process 0 for one that hangs."""
        now = time.monotonic()
        if self._me and now - self._answered > self.max_silence:
            self._lost(0, f"it has not answered for {now - self._answered:.0f} s")
        for i, beat in self._heartbeats.items():
            if now - beat.received > self.max_silence:
                self._lost(i, f"it has not been heard for {now - beat.received:.0f} s")
        if self._me == 0:
            self._find_hanging(now)

    def _find_hanging(self, now: float) -> None:
        """A run is as far as its slowest process, and goes on where one in that phase progresses.

        Of several processes there, the one hangs that does not wait for another.
        """
        found = {self._me: self.current()} | {i: b.status for i, b in self._heartbeats.items()}
        culprit = min(found, key=lambda i: (found[i].phases, found[i].waiting))
        suspicion = self.guard.peer_timeout_s * _SUSPICION
        if culprit != self._me and now - self._heartbeats[culprit].received > suspicion:
            return  # it is silent as well, so it does not hang: soon it is lost
        status = found[culprit]
        there = {i: s.progress for i, s in found.items() if s.phases == status.phases}
        if (status.phases, there) != self._last:
            self._last, self._since = (status.phases, there), now
        elif status.timeout_s and now - self._since > status.timeout_s:
            key = "compile" if status.timeout_s == self.guard.compile_timeout_s else "hang"
            also = ", and no other process is further" * (len(there) == len(found))
            why = f"nothing has happened there for {now - self._since:.0f} s{also}"
            sentence = f"process {culprit} hangs {status}: {why} (config.guard.{key}_timeout_s)"
            self._end(EXIT_LOST_PEER, culprit, sentence)

    def _lost(self, i: int, why: str) -> None:
        status = self._heartbeats[i].status if i in self._heartbeats else self.status
        self._end(EXIT_LOST_PEER, i, f"process {i} was lost {status}: {why}")

    def _end(self, code: int, culprit: int, why: str) -> None:
        """Prints and carries out the verdict; only in the first thread that calls it."""
        if self.stopped or not self._ending.acquire(blocking=False):
            return
        again = "" if code in _FINAL_CODES else "; run the same command again"
        try:
            notice(f"{why}{again}")
            if culprit == self._me:
                with contextlib.suppress(Exception):  # stderr may be closed
                    faulthandler.dump_traceback(all_threads=True)
            if self._me == 0:
                self._publish_verdict(code, culprit, why)
        finally:
            _exit(code)

    def _aborted(self, number: int) -> None:
        """Handles SIGABRT: JAX ends this process by it once process 0 is gone, or it is a crash."""
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        except OSError:
            self._lost(0, "its connections are closed")
            threading.Event().wait(self.guard.peer_timeout_s)  # while another thread says so


def _exit(code: int) -> NoReturn:
    try:
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def _on_abort(handle: Any) -> None:
    """Sets a handler for the aborting thread; Python's would wait for a main thread that hangs."""
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)  # must stay alive
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


_abort_handler: Any = None
_watchdog: Watchdog | None = None


def start(cluster: tuple[str, int, int], guard: GuardConfig) -> None:
    """Starts the watchdog of several processes (`coordination.join`)."""
    global _watchdog
    _watchdog = Watchdog(coordination.client(), cluster, guard)


def at(phase: str, step: int | None = None, slow: bool = False) -> None:
    """Enters a phase, in all processes alike; without progress there in time, all stop.

    slow: something is compiled, read or written first: guard.compile_timeout_s applies.
    """
    if _watchdog is not None:
        guard = _watchdog.guard
        timeout = guard.compile_timeout_s if slow else guard.hang_timeout_s
        _watchdog.status = Status(_watchdog.status.phases + 1, phase, step, timeout)


def tick() -> None:
    """Counts progress in the current phase: work that is done, never waiting. Costs nothing."""
    if _watchdog is not None:
        _watchdog.progress += 1


def ticking(items: Iterable[T]) -> Iterator[T]:
    """The same items; each counts as progress."""
    for item in items:
        tick()
        yield item


def finish() -> None:
    """Ends a command that worked: waits, still watched, until all processes are here."""
    global _watchdog
    if _watchdog is not None:
        at("waiting for the others to end", slow=True)
        coordination.on_all(lambda: None)
        _watchdog.stopped = True
        faulthandler.cancel_dump_traceback_later()
        _watchdog = None


def abort(exit_code: int, why: str = "") -> None:
    """Ends one of several processes after an error, and lets the others know; one alone returns."""
    if _watchdog is not None:
        _watchdog.abort(exit_code, why)
    elif coordination.are_several():
        _exit(exit_code)


def abort_if_peer_lost(error: BaseException) -> None:
    """Ends one of several processes after an error that comes from another one's end."""
    if _watchdog is None or not (message := coordination.lost_peer(error)):
        return
    timeout = _watchdog.guard.peer_timeout_s
    _watchdog.max_silence = min(_watchdog.max_silence, timeout * _SUSPICION)
    time.sleep(timeout * 0.9)  # meanwhile the watchdog names the process that is gone, and ends us
    why = f"the connection to another process broke ({message})"
    notice(f"{why}; run the same command again")
    _watchdog.abort(EXIT_LOST_PEER, why)
