"""Several processes: how they find each other, and how they agree.

A launcher sets UOE_COORDINATOR (host:port of process 0), UOE_PROCESSES (how many) and
UOE_PROCESS_ID (0, 1, …); without them there is one process. What only one can see (a file, a clock)
is decided in process 0 and sent to the others (`on_process_zero`), or compared (`assert_same`), by
JAX's coordination service: before a device is touched, in the same order in every process.
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

_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of launchers
_RECEIVE_TIMEOUT_S = 7 * 24 * 3600  # the watchdog notices a process that is lost or hangs
_OWN_NAME_S, _NAME_S = 30, 120  # to resolve process 0's name: itself; others, which start earlier
_calls = itertools.count()
waiting = False  # for a message of another process


class RemoteProcessError(UserError):
    """What went wrong in another process, which has shown it to the user."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostPeer(UserError):
    """Another process is gone, or does not answer."""

    exit_code = EXIT_LOST_PEER


def cluster_from_env(environ: Mapping[str, str] = os.environ) -> tuple[str, int, int] | None:
    """(coordinator, number of processes, this one's id); None for one. UserError if invalid."""
    given = {name: environ[name] for name in NAMES if environ.get(name)}
    names = ", ".join(NAMES)
    if not given:
        for name in _TASK_COUNTS:
            if environ.get(name, "1") not in ("", "1"):
                problem = f"{environ[name]} tasks were started and none was given its place"
                remedy = f"so each would train alone; set {names} as launch/slurm.sbatch does"
                raise UserError(f"{name}={environ[name]}: {problem}, {remedy}")
        return None
    for name in NAMES:
        if name not in given:
            problem = f"is not set while {next(iter(given))} is"
            raise UserError(f"{name}: {problem}; give all of {names}, or none")
    address, n_processes, process_id = (given[name] for name in NAMES)
    port = re.fullmatch(r"(?:[\w.\-]+|\[[\w.:]+\]):([0-9]{1,5})", address, re.ASCII)
    if port is None or not 0 < int(port[1]) < 65536:
        raise UserError(f"{COORDINATOR}={address}: give host:port of process 0, as node1:8476")
    count, me = (int(v) if v.isdecimal() else -1 for v in (n_processes, process_id))
    if count < 1:
        raise UserError(f"{PROCESSES}={n_processes}: give the number of processes, 1 or more")
    if not 0 <= me < count:
        remedy = f"give a number from 0 to {count - 1} ({PROCESSES}={count})"
        raise UserError(f"{PROCESS_ID}={process_id}: {remedy}")
    return address, count, me


def join(stops_itself: bool) -> tuple[str, int, int] | None:
    """Connects to the other processes, if there are any; before the first use of a device.

    stops_itself: the command calls `preempted` at every step; others end by SIGTERM at once.
    """
    cluster = cluster_from_env()
    if cluster is None:
        return None
    import jax

    coordinator, count, me = cluster
    # First a notice: JAX ends the process without an exception where the others do not come.
    notice(f"process {me} of {count}: meeting the others at {coordinator}")
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # native code prints on stderr: Gloo logs its connections to stdout
    sys.stdout = Output(sys.stdout, open(stdout, "wb"))
    _await_name(coordinator, me)
    here = coordinator.rpartition(":")[0] in ("127.0.0.1", "localhost")
    if me == 0:
        _check_port(coordinator, here)
    jax.distributed.initialize(
        *cluster,
        cluster_detection_method="deactivate",  # under SLURM it would take one device a task
        coordinator_bind_address=coordinator if here else None,  # else all interfaces
    )
    if not stops_itself:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return cluster


def _await_name(coordinator: str, me: int) -> None:
    """Waits until the host of UOE_COORDINATOR resolves: its machine may just be starting."""
    host = coordinator.rpartition(":")[0].strip("[]")
    if not (why := unknown_host(host)):
        return
    given, seconds = f"{COORDINATOR}={coordinator}", _NAME_S if me else _OWN_NAME_S
    problem, deadline = f"{host} has no address here ({why})", time.monotonic() + seconds
    notice(f"{given}: {problem}; waiting for one, {seconds} s at most")
    while unknown_host(host):
        if time.monotonic() > deadline:
            kind = LostPeer if me else UserError
            raise kind(f"{given}: {problem}; give a name or address of process 0's machine")
        time.sleep(0.5)


def _check_port(coordinator: str, here: bool) -> None:
    """Refuses a port that process 0 cannot listen at: JAX would crash."""
    host, _, port = coordinator.rpartition(":")
    problem = f"{COORDINATOR}={coordinator}: process 0 cannot listen at port {port}"
    with os_error_as(UserError, problem, "give another port"):
        socket.create_server((host if here else "", int(port))).close()


def are_several() -> bool:
    """Whether this process is one of several that met (`join`)."""
    return client() is not None


def is_process_zero() -> bool:
    """Whether this is the process that writes logs and files."""
    import jax

    return jax.process_index() == 0


def on_process_zero(do: Callable[[], T]) -> T:
    """The result (JSON: lists, not tuples) of `do` in process 0, or its error, in every process."""
    if not are_several():
        return do()
    return _exchange(do, senders=1)[0]


def on_all(do: Callable[[], T]) -> T:
    """The result of `do` here, once it worked in all processes; an error is raised in all."""
    if not are_several():
        return do()
    result: list[T] = []
    _exchange(lambda: result.append(do()))
    return result[0]


def assert_same(values: Mapping[str, Any], remedy: str) -> None:
    """UserError in every process for the first value (JSON) that differs from process 0's."""
    first, *others = _exchange(lambda: dict(values)) if are_several() else [values]
    for i, found in enumerate(others, 1):
        for key, value in first.items():
            if found.get(key) != value:
                differs = f"{key}={found.get(key)!r} in process {i} and {value!r} in process 0"
                raise UserError(f"{differs}: {remedy}")


def same_command(config: Config, **options: Any) -> None:
    """Refuses processes that were given different configurations or options."""
    given = {f"config.{name}": value for name, value, _ in leaves(config)}
    given |= {f"--{name}": value for name, value in options.items()}
    assert_same(given, "start every process with the same command")


def _exchange(do: Callable[[], T], senders: int | None = None) -> list[T]:
    """The results (JSON) of `do` in the first `senders` processes (all), in every process.

    Raises the first error of `do`: the error itself here, a RemoteProcessError elsewhere.
    """
    import jax

    service, name, me = client(), f"uoe/call/{next(_calls)}", jax.process_index()
    senders = senders or jax.process_count()
    if me < senders:
        try:
            text = json.dumps({"value": do()})
        except Exception as error:
            code = error.exit_code if isinstance(error, UserError) else EXIT_FAILED
            failure = {"error": str(error)[:2000], "exit_code": code}
            service.key_value_set(f"{name}/{me}", json.dumps(failure))
            raise
        service.key_value_set(f"{name}/{me}", text)
    return [_receive(service, name, i) for i in range(senders)]


def _receive(service: Any, name: str, i: int) -> Any:
    """The value that process i published; raises its error, or LostPeer where nothing comes."""
    global waiting
    waiting = True
    try:
        text = service.blocking_key_value_get(f"{name}/{i}", _RECEIVE_TIMEOUT_S * 1000)
    except Exception as error:
        raise LostPeer(f"process {i} cannot be heard; run the same command again") from error
    finally:
        waiting = False
    message = json.loads(text)
    if "error" in message:
        raise RemoteProcessError(message["error"], message["exit_code"])
    return message["value"]


def preempted(step: int) -> bool:
    """Whether all processes are to stop at this step, as one got SIGTERM; call it at every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


# What JAX says where another process is gone, seen with Gloo and the coordination service. In a
# ValueError only names of collectives count: clients of storage fail with similar words.
_LOSSES = "connection (reset|closed)|heartbeat|coordination service|unavailable:|deadline_exceeded"
_SIGNS = {"JaxRuntimeError": f"gloo|nccl|{_LOSSES}", "ValueError": "gloo|nccl"}


def lost_peer(error: BaseException) -> str | None:
    """JAX's message, if an error of one of several processes, or its cause, is a lost process."""
    link: BaseException | None = error
    while link is not None and are_several():
        signs = _SIGNS.get(type(link).__name__)
        if signs and re.search(signs, str(link), re.IGNORECASE):
            return str(link).strip().partition("\n")[0][:200]
        link = link.__cause__ or link.__context__
    return None


def client() -> Any:
    """JAX's client of the coordination service (a private name of JAX); None for one process."""
    if "jax" not in sys.modules:
        return None  # a wrong configuration is refused before jax is imported
    from jax._src import distributed

    return distributed.global_state.client
