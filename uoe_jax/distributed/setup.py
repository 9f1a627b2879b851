"""How jax is set up for a command: the other processes, the compilation cache, and which devices there are."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import jax

from uoe_jax import runtime_env
from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.errors import UserError

# Of XLA on GPUs: no kernel that adds in the order of arrival, and no choice of kernels by their time, which differs from run
# to run. CPUs and TPUs have nothing to turn on.
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def start(config: Config, stops_itself: bool = False) -> None:
    """Meets the other processes (`processes.join`), watches them, sets jax up, finds its devices.

    The persistent compilation cache is in a folder only its owner can read, and of this number of cores: XLA divides loops among
    those it finds when it compiles, and JAX's key does not tell them. A program compiled on one core, read on two, ran there up to
    1.2 times as long as one compiled on two. JAX_COMPILATION_CACHE_DIR wins.

    Raises:
      UserError: variables of XLA or jax that these do not take, or with which there is no device;
        or a cache that cannot be made.
    """
    coordination.join(stops_itself)
    watchdog.start(config.guard)
    runtime_env.check_variables(jax.lib.__version__)
    if config.train.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    _find_devices()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"jax_{cores}_cores"
        folder = coordination.on_all(lambda: _made(runtime_env.default_cache_dir() / name))
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _find_devices() -> None:
    """Makes jax look for the devices of all processes; UserError where it finds none here."""
    try:
        jax.devices()
    except Exception as error:
        if coordination.lost_peer(error):
            raise
        raise runtime_env.no_device(error) from error


def _made(folder: Path) -> Path:
    """A folder that only its owner can read: it holds native code."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        remedy = "set UOE_CACHE to another directory"
        raise UserError(f"{folder}: cannot be made ({error.strerror}); {remedy}") from error
    return folder


def cost_of_determinism() -> str:
    """What train.deterministic does on the devices at hand, for the person."""
    if jax.default_backend() == "gpu":
        return f"{_DETERMINISTIC}: some kernels are slower (how much was not measured), and none is chosen by its time"
    return (
        f"nothing to turn on for {jax.default_backend()}, which is deterministic as it is: no cost"
    )


def host_peak_bytes() -> int:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_devices() -> str:
    """'8 x NVIDIA H200 (2 processes)'."""
    kinds = sorted({d.device_kind for d in jax.devices()})
    several = f" ({jax.process_count()} processes)" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {', '.join(kinds)}{several}"
