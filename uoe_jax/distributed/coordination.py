"""Several processes: how they find each other, and how they agree.

A process gets its place from its launcher through three variables: UOE_COORDINATOR (host:port of
process 0, the same for all), UOE_PROCESSES (how many) and UOE_PROCESS_ID (0, 1, …). Without them
there is one process.

What only one process can see (a file, a disk, a clock, a signal) is decided in process 0 and sent
to the others (`on_process_zero`), or compared (`assert_same`). Both use JAX's coordination service
and no device, so they work before the first device is touched and name the process that is missing.
Every process must make these calls in the same order.
"""

import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from uoe_jax.config.fields import leaves
from uoe_jax.config.schema import Config
from uoe_jax.errors import EXIT_FAILED, EXIT_LOST_PEER, UserError, os_error_as
from uoe_jax.runtime_env import Output, notice, unknown_host

T = TypeVar("T")
COORDINATOR, PROCESSES, PROCESS_ID = NAMES = ("UOE_COORDINATOR", "UOE_PROCESSES", "UOE_PROCESS_ID")

# How launchers give the number of tasks; only to notice that our variables are missing.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RECEIVE_TIMEOUT_S = 7 * 24 * 3600  # the watchdog notices a process that is lost or hangs
# For the name of process 0 to resolve: for itself, and for others, which may start long before.
_OWN_NAME_S, _NAME_S = 30, 120
_calls = itertools.count()
_waiting = False


class RemoteProcessError(UserError):
    """What went wrong in another process, which has shown it to the user."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostPeer(UserError):
    """Another process is gone, or does not answer."""

    exit_code = EXIT_LOST_PEER


def cluster_from_env(environ: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, this one's id) from the environment; None for one process.

    UserError for incomplete or invalid variables, or tasks that were started without them.
    """
    given = {name: environ[name] for name in NAMES if environ.get(name)}
    if not given:
        for name in _TASK_COUNTS:
            if environ.get(name, "1") not in ("", "1"):
                problem = f"{environ[name]} tasks were started and none was given its place"
                remedy = f"set {', '.join(NAMES)} as launch/slurm.sbatch does"
                result = "so each would train alone in the same workdir"
                raise UserError(f"{name}={environ[name]}: {problem}, {result}; {remedy}")
        return None
    for name in NAMES:
        if name not in given:
            remedy = f"give all of {', '.join(NAMES)}, or none"
            raise UserError(f"{name}: is not set while {next(iter(given))} is; {remedy}")
    address, n_processes, process_id = (given[name] for name in NAMES)
    port = re.fullmatch(r"(?:[\w.\-]+|\[[\w.:]+\]):([0-9]{1,5})", address, re.ASCII)
    if port is None or not 0 < int(port[1]) < 65536:
        remedy = "give host:port of process 0, such as node1:8476"
        raise UserError(f"{COORDINATOR}={address}: {remedy}")
    count, me = (int(v) if v.isdecimal() else -1 for v in (n_processes, process_id))
    if count < 1:
        raise UserError(f"{PROCESSES}={n_processes}: give the number of processes, 1 or more")
    if not 0 <= me < count:
        remedy = f"give a number from 0 to {count - 1} ({PROCESSES}={count})"
        raise UserError(f"{PROCESS_ID}={process_id}: {remedy}")
    return address, count, me


def join(stops_itself: bool) -> None:
    """Connects to the other processes, if there are any; before the first use of a device.

    stops_itself: the command calls `preempted` at every step; others end by SIGTERM at once.
    UserError where process 0 has no such address or port, LostPeer where others do not find it.
    """
    cluster = cluster_from_env()
    if cluster is None:
        return
    import jax

    coordinator, count, me = cluster
    # First a notice: JAX ends the process without an exception where the others do not come.
    notice(f"process {me} of {count}: meeting the others at {coordinator}")
    _redirect_native_stdout()
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
    """Waits until the host of UOE_COORDINATOR resolves: its machine may just be starting."""
    host = coordinator.rpartition(":")[0].strip("[]")
    seconds = _NAME_S if me else _OWN_NAME_S
    deadline = time.monotonic() + seconds
    if why := unknown_host(host):
        wait = f"{host} has no address here ({why}); waiting for one, {seconds} s at most"
        notice(f"{COORDINATOR}={coordinator}: {wait}")
    while why and time.monotonic() < deadline:
        time.sleep(0.5)
        why = unknown_host(host)
    if why:
        kind = LostPeer if me else UserError
        remedy = "give a name or address of process 0's machine"
        raise kind(f"{COORDINATOR}={coordinator}: {host} has no address here ({why}); {remedy}")


def _check_port(coordinator: str, here: bool) -> None:
    """Refuses a port that process 0 cannot listen at: JAX would crash."""
    host, _, port = coordinator.rpartition(":")
    problem = f"{COORDINATOR}={coordinator}: process 0 cannot listen at port {port}"
    with os_error_as(UserError, problem, "give another port"), socket.socket() as probe:
        # Connections that were just closed do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host if here else "", int(port)))


def _redirect_native_stdout() -> None:
    """Sends stdout of native code to stderr: Gloo logs its connections to stdout."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = Output(sys.stdout, open(ours, "wb"))


def are_several() -> bool:
    """Whether this process is one of several that met (`join`)."""
    return client() is not None


def is_process_zero() -> bool:
    """Whether this is the process that writes logs and files."""
    import jax

    return jax.process_index() == 0


def on_process_zero(do: Callable[[], T]) -> T:
    """The result of `do` in process 0, in every process; what it raises is raised in every process.

    The result must be JSON (lists, not tuples).
    """
    service = client()
    if service is None:
        return do()
    name = f"uoe/first/{next(_calls)}"
    if is_process_zero():
        return _publish(service, name, 0, do, with_value=True)
    return _receive(service, name, 0)


def on_all(do: Callable[[], T]) -> T:
    """The result of `do` here, once it worked in all processes; an error is raised in all."""
    service = client()
    if service is None:
        return do()
    import jax

    name = f"uoe/together/{next(_calls)}"
    value = _publish(service, name, jax.process_index(), do, with_value=False)
    for i in range(jax.process_count()):
        _receive(service, name, i)
    return value


def assert_same(values: Mapping[str, Any], remedy: str) -> None:
    """UserError in every process for the first value (JSON) that differs from process 0's."""
    service = client()
    if service is None:
        return
    import jax

    name = f"uoe/same/{next(_calls)}"
    _publish(service, name, jax.process_index(), lambda: dict(values), with_value=True)
    first = _receive(service, name, 0)
    for i in range(1, jax.process_count()):
        found = _receive(service, name, i)
        for key, value in first.items():
            if found.get(key) != value:
                differs = f"{key}={found.get(key)!r} in process {i} and {value!r} in process 0"
                raise UserError(f"{differs}: {remedy}")


def same_command(config: Config, **options: Any) -> None:
    """Refuses processes that were given different configurations or options."""
    given = {f"config.{name}": value for name, value, _ in leaves(config)}
    given |= {f"--{name}": value for name, value in options.items()}
    assert_same(given, "start every process with the same command")


def _publish(service: Any, name: str, me: int, do: Callable[[], T], with_value: bool) -> T:
    """Returns the result of `do`, or raises its error, once the others can read it."""
    try:
        value = do()
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else EXIT_FAILED
        message = {"error": str(error)[:2000], "exit_code": code}
        service.key_value_set(f"{name}/{me}", json.dumps(message))
        raise
    service.key_value_set(f"{name}/{me}", json.dumps({"value": value if with_value else None}))
    return value


def _receive(service: Any, name: str, i: int) -> Any:
    """The value that process i published; raises its error, or LostPeer where nothing comes."""
    global _waiting
    _waiting = True
    try:
        text = service.blocking_key_value_get(f"{name}/{i}", _RECEIVE_TIMEOUT_S * 1000)
    except Exception as error:
        raise LostPeer(f"process {i} cannot be heard; run the same command again") from error
    finally:
        _waiting = False
    message = json.loads(text)
    if "error" in message:
        raise RemoteProcessError(message["error"], message["exit_code"])
    return message["value"]


def is_waiting() -> bool:
    """Whether this process waits for a message of another one."""
    return _waiting


def preempted(step: int) -> bool:
    """Whether all processes are to stop at this step, as one got SIGTERM; call it at every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


# What JAX says where another process is gone, seen with Gloo and the coordination service. In a
# ValueError only names of collectives count: clients of storage fail with similar words.
_COLLECTIVES = ("gloo", "nccl")
_LOSSES = (
    *("connection reset", "connection closed", "heartbeat", "coordination service"),
    *("unavailable:", "deadline_exceeded"),
)
_SIGNS = {"JaxRuntimeError": (*_COLLECTIVES, *_LOSSES), "ValueError": _COLLECTIVES}


def lost_peer(error: BaseException) -> str | None:
    """JAX's message, if an error of one of several processes, or its cause, is a lost process."""
    link: BaseException | None = error
    while link is not None and are_several():
        signs = _SIGNS.get(type(link).__name__, ())
        if any(sign in str(link).lower() for sign in signs):
            return str(link).strip().partition("\n")[0][:200]
        link = link.__cause__ or link.__context__
    return None


def client() -> Any:
    """JAX's client of the coordination service (a private name of JAX); None for one process."""
    if "jax" not in sys.modules:
        return None  # a wrong configuration is refused before jax is imported
    from jax._src import distributed

    return distributed.global_state.client
