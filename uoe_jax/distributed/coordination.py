"""Several processes: how they find each other, and how they stay agreed.

Each is told, by its launcher and by nothing else, through three variables: UOE_COORDINATOR (host:port of process 0, the
same for all), UOE_PROCESSES (how many) and UOE_PROCESS_ID (0, 1, …). None of them: one process.

What only one process can see (a file, a disk, a clock, a signal) is decided in process 0 and told to the others
(`on_process_zero`), or compared (`assert_same`). Both go through JAX's coordination service and not through a device, so they work
before the first device is touched and name who is missing. Every process must make these calls in the same order.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from typing import Any, Callable, Mapping, TypeVar

from uoe_jax import errors, runtime_env
from uoe_jax.config.fields import leaves
from uoe_jax.config.schema import Config
from uoe_jax.errors import UserError

T = TypeVar("T")
COORDINATOR, PROCESSES, PROCESS_ID = NAMES = ("UOE_COORDINATOR", "UOE_PROCESSES", "UOE_PROCESS_ID")

# Launchers that start several tasks, and what they tell each of them. Not used, only to notice that nobody told us.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_PATIENCE_S = 7 * 24 * 3600  # for what others do alone; one that is lost or hangs the watch notices
# For the name of process 0 to become known: to itself, and to others, which may start long before.
_OWN_NAME_S, _NAME_S = 30, 120
_calls = itertools.count()
_waiting = False


def cluster_from_env(environ: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """(coordinator, processes, this one's id) from the environment; None for a single process. Imports no jax.

    Raises:
      UserError: some of the three are missing or cannot be right; or several tasks were started and told nothing.
    """
    given = {name: environ[name] for name in NAMES if environ.get(name)}
    if not given:
        for name in _TASK_COUNTS:
            if environ.get(name, "1") not in ("", "1"):
                raise UserError(
                    f"{name}={environ[name]}: {environ[name]} tasks were started and none was told its place, so each "
                    f"would train alone in the same workdir; set {', '.join(NAMES)} as launch/slurm.sbatch does"
                )
        return None
    for name in NAMES:
        if name not in given:
            raise UserError(
                f"{name}: is not set while {next(iter(given))} is; give all of {', '.join(NAMES)}, or none"
            )
    port = re.fullmatch(r"(?:[\w.\-]+|\[[\w.:]+\]):([0-9]{1,5})", given[COORDINATOR], re.ASCII)
    if port is None or not 0 < int(port[1]) < 65536:
        raise UserError(
            f"{COORDINATOR}={given[COORDINATOR]}: give host:port of process 0, such as node1:8476"
        )
    count, me = (int(v) if v.isdecimal() else -1 for v in (given[PROCESSES], given[PROCESS_ID]))
    if count < 1:
        raise UserError(f"{PROCESSES}={given[PROCESSES]}: give the number of processes, 1 or more")
    if not 0 <= me < count:
        raise UserError(
            f"{PROCESS_ID}={given[PROCESS_ID]}: give a number from 0 to {count - 1} ({PROCESSES}={count})"
        )
    return given[COORDINATOR], count, me


def join(stops_itself: bool) -> None:
    """Meets the other processes, where there are any; before the first use of a device.

    stops_itself: the command asks `preempted` at every step; others end by SIGTERM as programs do, and not when JAX likes.
    JAX ends the process without an exception where the others do not come, so what is waited for is said before.

    Raises:
      UserError: process 0 has no such address or port. LostPeer: its name has no address here.
    """
    place = cluster_from_env()
    if place is None:
        return
    import jax

    coordinator, count, me = place
    print(
        f"uoe: process {me} of {count}: meeting the others at {coordinator}",
        file=sys.stderr,
        flush=True,
    )
    _keep_stdout_ours()
    _await_name(coordinator, me)
    here = coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost")
    if me == 0:
        _check_port(coordinator, here)
    jax.distributed.initialize(
        coordinator,
        count,
        me,
        cluster_detection_method="deactivate",  # under SLURM it would take one device a task
        coordinator_bind_address=coordinator if here else None,  # else all interfaces
    )
    if not stops_itself:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _await_name(coordinator: str, me: int) -> None:
    """Waits until the host of UOE_COORDINATOR has an address: its machine may just be starting."""
    host = coordinator.rpartition(":")[0].strip("[]")
    seconds = _NAME_S if me else _OWN_NAME_S
    until = time.monotonic() + seconds
    unknown, said = runtime_env.unknown_host(host), False
    while unknown and time.monotonic() < until:
        if not said:
            wait = f"{host} has no address here ({unknown}); waiting for one, {seconds} s at most"
            print(f"uoe: {COORDINATOR}={coordinator}: {wait}", file=sys.stderr, flush=True)
        said = True
        time.sleep(0.5)
        unknown = runtime_env.unknown_host(host)
    if unknown:
        kind = LostPeer if me else UserError
        remedy = "give a name or address of process 0's machine"
        raise kind(f"{COORDINATOR}={coordinator}: {host} has no address here ({unknown}); {remedy}")


def _check_port(coordinator: str, here: bool) -> None:
    """Refuses a port that process 0 cannot listen at: JAX would end it by a fault of memory."""
    host, _, port = coordinator.rpartition(":")
    try:
        with socket.socket() as probe:
            # Connections that were just closed do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host if here else "", int(port)))
    except OSError as error:
        said = f"process 0 cannot listen at port {port} ({error.strerror}); give another port"
        raise UserError(f"{COORDINATOR}={coordinator}: {said}") from error


def _keep_stdout_ours() -> None:
    """What is not written by Python goes to stderr: Gloo tells of its connections on stdout, where results belong."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = runtime_env.Output(sys.stdout, open(ours, "wb"))


def are_several() -> bool:
    """Whether this process is one of several that met (`join`)."""
    return client() is not None


def is_process_zero() -> bool:
    """Whether this is the process that writes logs and files."""
    import jax

    return jax.process_index() == 0


def on_process_zero(do: Callable[[], T]) -> T:
    """What `do` gives in process 0, in every process; what it raises is raised in every process.

    The result must be JSON (lists, not tuples).
    """
    service = client()
    if service is None:
        return do()
    name = f"uoe/first/{next(_calls)}"
    return (
        _telling(service, name, 0, do, tells_value=True)
        if is_process_zero()
        else _heard(service, name, 0)
    )


def on_all(do: Callable[[], T]) -> T:
    """What `do` gives in this process, once it is known to have worked in all; what it raises in one is raised in all."""
    service = client()
    if service is None:
        return do()
    import jax

    name = f"uoe/together/{next(_calls)}"
    value = _telling(service, name, jax.process_index(), do, tells_value=False)
    for i in range(jax.process_count()):
        _heard(service, name, i)
    return value


def assert_same(values: Mapping[str, Any], remedy: str) -> None:
    """Refuses to go on where a process has other values (JSON) than process 0.

    Raises:
      UserError: naming the first process and value that differ; in every process.
    """
    service = client()
    if service is None:
        return
    import jax

    name = f"uoe/same/{next(_calls)}"
    _telling(service, name, jax.process_index(), lambda: dict(values), tells_value=True)
    first = None
    for i in range(jax.process_count()):
        found = _heard(service, name, i)
        first = found if first is None else first
        for key, value in first.items():
            if found.get(key) != value:
                raise UserError(
                    f"{key}={found.get(key)!r} in process {i} and {value!r} in process 0: {remedy}"
                )


def same_command(config: Config, **options: Any) -> None:
    """Refuses to go on where processes were given different configurations or options."""
    given = {f"config.{name}": value for name, value, _ in leaves(config)}
    assert_same(
        given | {f"--{name}": value for name, value in options.items()},
        "start every process with the same command",
    )


def _telling(service: Any, name: str, me: int, do: Callable[[], T], tells_value: bool) -> T:
    """What `do` gives, or raises, in this process; the others can hear of it."""
    try:
        value = do()
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else errors.EXIT_FAILED
        service.key_value_set(
            f"{name}/{me}", json.dumps({"error": str(error)[:2000], "exit_code": code})
        )
        raise
    service.key_value_set(f"{name}/{me}", json.dumps({"value": value if tells_value else None}))
    return value


def _heard(service: Any, name: str, i: int) -> Any:
    """The value that process i told; raises what it raised, or LostPeer where it says nothing for long."""
    global _waiting
    _waiting = True
    try:
        said = json.loads(service.blocking_key_value_get(f"{name}/{i}", _PATIENCE_S * 1000))
    except Exception as error:
        raise LostPeer(f"process {i} cannot be heard; run the same command again") from error
    finally:
        _waiting = False
    if "error" in said:
        raise RemoteProcessError(said["error"], said["exit_code"])
    return said["value"]


def waits() -> bool:
    """Whether this process waits for what another is to tell it."""
    return _waiting


def preempted(number: int) -> bool:
    """Whether all of several processes are to stop at this step, because one got SIGTERM; to be asked at every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(number)


class RemoteProcessError(UserError):
    """What went wrong in another process, which has told the person."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostPeer(UserError):
    """Another process is gone, or does not answer."""

    exit_code = errors.EXIT_LOST_PEER


# What JAX says where another process is gone; seen with Gloo and the coordination service. It comes as a ValueError, too, where
# only what names the collectives counts: the clients of storage fail with like words.
_COLLECTIVES = ("gloo", "nccl")
_LOSSES = (
    "connection reset",
    "connection closed",
    "heartbeat",
    "coordination service",
    "unavailable:",
    "deadline_exceeded",
)


def lost_peer(error: BaseException) -> str | None:
    """What JAX said, if an error of one of several processes, or one it came from, is about another's end."""
    link: BaseException | None = error
    while link is not None and are_several():
        text = str(link).strip().partition("\n")[0][:200]
        signs = {"JaxRuntimeError": (*_COLLECTIVES, *_LOSSES), "ValueError": _COLLECTIVES}.get(
            type(link).__name__, ()
        )
        if any(sign in str(link).lower() for sign in signs):
            return text
        link = link.__cause__ or link.__context__
    return None


def client() -> Any:
    """JAX's client of the coordination service; None where there is one process. The one private name used for it."""
    if "jax" not in sys.modules:
        return None  # nobody has met yet, and a wrong key is answered before jax is imported
    from jax._src import distributed

    return distributed.global_state.client
