#!/usr/bin/env python3
"""Runs a program as P processes of M devices each on this machine.

    python launch/local.py --processes=2 --devices=4 -- uoe train --config=digits --workdir=runs/a

Needs Python 3.11 alone; --platform=gpu also P x M GPUs. Each process gets its place through
UOE_COORDINATOR, UOE_PROCESSES and UOE_PROCESS_ID (docs/launch.md). Process 0 writes to the
terminal as it would alone; lines of the others begin with their number, "[1] ". SIGINT, SIGTERM
and SIGUSR1 are passed on to all of them, SIGHUP as SIGTERM. Exit code: 0 if all end with 0; 75 if
all end with 0 or 75; else that of the first process that failed (128 + n if signal n ended it),
after which the others are ended too.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO, NoReturn, Sequence

EXIT_DONE, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_LOST_PEER = 0, 2, 75, 77  # as in uoe_jax/errors.py
FORWARDED = {"SIGINT": "SIGINT", "SIGTERM": "SIGTERM", "SIGUSR1": "SIGUSR1", "SIGHUP": "SIGTERM"}
_POLL_S = 0.02
_TERM_S = 5.0  # between the SIGTERM and the SIGKILL of those left over


class BadInput(Exception):
    """One sentence: option, value, remedy."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see launch/local.py --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    open_streams()
    try:
        options = read_options(sys.argv[1:] if argv is None else argv)
        coordinator = f"127.0.0.1:{free_port()}"
        places = [place(options, i, coordinator) for i in range(options.processes)]
    except BadInput as error:
        print(f"local.py: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    if options.dry_run:
        for env in places:
            print(
                " ".join(
                    [
                        *(f"{k}={shlex.quote(v)}" for k, v in env.items()),
                        shlex.join(options.command),
                    ]
                )
            )
        return EXIT_DONE
    return Launch(options.command, places, options.grace).run()


def open_streams() -> None:
    """Opens /dev/null where a standard stream is closed, whose number a pipe would else take."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `command` is what follows `--`.

    Raises:
      BadInput: something cannot be right.
    """
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    text = (__doc__ or "").partition("\n\n")
    parser = _Parser(
        prog="launch/local.py",
        usage="%(prog)s [options] -- COMMAND …",
        description=text[0],
        epilog=text[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--processes", type=int, required=True, metavar="P", help="how many processes"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="M", help="devices of each (default 1)"
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu"), default="cpu", help="kind of device (default cpu)"
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds the others get when one fails (10)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the environment and command of each process"
    )
    options = parser.parse_args(argv[:at])
    options.command = argv[at + 1 :]
    for name in ("processes", "devices"):
        if getattr(options, name) < 1:
            raise BadInput(f"--{name}={getattr(options, name)}: give 1 or more")
    if not 0 <= options.grace < float("inf"):
        raise BadInput(f"--grace={options.grace:g}: give 0 or more seconds")
    if not options.command:
        raise BadInput(
            "no command: put it after --, such as -- uoe train --config=quickstart --workdir=runs/a"
        )
    if shutil.which(options.command[0]) is None:
        raise BadInput(
            f"{options.command[0]}: no such program; give a path or the name of one on PATH"
        )
    return options


def place(options: argparse.Namespace, i: int, coordinator: str) -> dict[str, str]:
    """What process i finds in its environment beside ours."""
    env = {
        "UOE_COORDINATOR": coordinator,
        "UOE_PROCESSES": str(options.processes),
        "UOE_PROCESS_ID": str(i),
    }
    m = options.devices
    if options.platform == "gpu":
        cards = visible_cards(options.processes * m)
        return {
            **env,
            "JAX_PLATFORMS": "cuda",
            "CUDA_VISIBLE_DEVICES": ",".join(cards[i * m : (i + 1) * m]),
        }
    kept = [
        f
        for f in os.environ.get("XLA_FLAGS", "").split()
        if "xla_force_host_platform_device_count" not in f
    ]
    flags = " ".join([*kept, f"--xla_force_host_platform_device_count={m}"])
    return {**env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def visible_cards(n: int) -> list[str]:
    """The first n of CUDA_VISIBLE_DEVICES, or 0 … n-1 where that is not set.

    Raises:
      BadInput: there are fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        cards, where = [c for c in given.split(",") if c], f"CUDA_VISIBLE_DEVICES={given}"
    elif os.path.isdir("/proc/driver/nvidia/gpus"):
        cards, where = (
            [str(i) for i in range(len(os.listdir("/proc/driver/nvidia/gpus")))],
            "this machine",
        )
    else:
        return [
            str(i) for i in range(n)
        ]  # nothing here can count them; JAX will say what is missing
    if len(cards) < n:
        raise BadInput(
            f"--processes x --devices={n}: {where} has {len(cards)} GPUs; ask for at most that many"
        )
    return cards[:n]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Launch:
    """The processes of one run."""

    def __init__(
        self, command: Sequence[str], places: Sequence[dict[str, str]], grace: float
    ) -> None:
        self.command, self.places, self.grace = command, places, grace
        self.children: list[subprocess.Popen] = []
        self.readers: list[threading.Thread] = []
        self.signals: list[int] = []  # not passed on yet

    def run(self) -> int:
        """Starts all and waits for all; returns the exit code. Leaves no process behind."""
        for name in FORWARDED:
            signal.signal(getattr(signal, name), lambda number, frame: self.signals.append(number))
        try:
            for i, env in enumerate(self.places):
                self.children.append(self.start(i, env))
            self.read()  # after the last fork: a process with threads should not fork
            return self.wait()
        except OSError as error:
            print(
                f"local.py: {self.command[0]}: cannot be run ({error.strerror}); give a program",
                file=sys.stderr,
            )
            return EXIT_BAD_INPUT
        finally:
            for child in self.children:
                if child.poll() is None:
                    send(child, signal.SIGKILL)
                    child.wait()
            for reader in self.readers:
                reader.join(timeout=1)

    def start(self, i: int, env: dict[str, str]) -> subprocess.Popen:
        """Process 0 inherits our output; that of another is read and marked.

        Each gets a session of its own: a Ctrl-C in the terminal reaches only us, not them twice.
        """
        streams = {} if i == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            self.command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
            **streams,
        )

    def read(self) -> None:
        """Starts to copy what the processes other than 0 write."""
        for i, child in enumerate(self.children):
            for stream, ours in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                if stream is not None:
                    args = (stream, ours.buffer, f"[{i}] ".encode())
                    self.readers.append(threading.Thread(target=copy_lines, args=args, daemon=True))
                    self.readers[-1].start()

    def wait(self) -> int:
        """Waits for all. After a failure the others get `grace` seconds, then SIGTERM, SIGKILL."""
        running = dict(enumerate(self.children))
        codes: dict[int, int] = {}
        failed: int | None = None
        means: list[tuple[float, int]] = []  # (when, signal) for those left over
        while running:
            while self.signals:
                name = signal.Signals(self.signals.pop(0)).name
                for child in running.values():
                    send(child, getattr(signal, FORWARDED[name]))
            new = {
                i: exit_code(child.returncode)
                for i, child in running.items()
                if child.poll() is not None
            }
            for i in new:
                send(
                    running.pop(i), signal.SIGKILL
                )  # what it may have left in its group; at once, as its id is free now
            codes |= new
            bad = [code for code in new.values() if code not in (EXIT_DONE, EXIT_STOPPED)]
            if bad and failed is None:
                failed = min(
                    bad, key=lambda code: code == EXIT_LOST_PEER
                )  # who lost a peer did not fail first
                now = time.monotonic()
                means = [
                    (now + self.grace, signal.SIGTERM),
                    (now + self.grace + _TERM_S, signal.SIGKILL),
                ]
                ended = ", ".join(f"process {i} ended with {code}" for i, code in new.items())
                left = f"; the other {len(running)} get {self.grace:g} s to end" if running else ""
                print(f"local.py: {ended}{left}", file=sys.stderr, flush=True)
            if means and time.monotonic() >= means[0][0]:
                _, number = means.pop(0)
                for child in running.values():
                    send(child, number)
            time.sleep(_POLL_S)
        if failed is not None:
            return failed
        return EXIT_STOPPED if EXIT_STOPPED in codes.values() else EXIT_DONE


def exit_code(returncode: int) -> int:
    """As a shell gives it: 128 + n for signal n."""
    return 128 - returncode if returncode < 0 else returncode


def send(child: subprocess.Popen, number: int) -> None:
    """A signal for a child and all of its group, which lives on while any of its processes does."""
    try:
        os.killpg(child.pid, number)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # macOS says the latter of a group that is only zombies
        pass


def copy_lines(source: BinaryIO, sink: BinaryIO, mark: bytes) -> None:
    """Copies whole lines, marked; reads on when the sink is closed, or the child would block."""
    for line in source:
        try:
            sink.write(
                mark + line.rstrip(b"\n") + b"\n"
            )  # one write a line, so that lines do not mix
            sink.flush()
        except (OSError, ValueError):
            pass


def _die_with(parent: int):
    """For the child before its program starts: die with the launcher, even by SIGKILL (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    PR_SET_PDEATHSIG = 1

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(EXIT_LOST_PEER)

    return prepare


if __name__ == "__main__":
    sys.exit(main())
