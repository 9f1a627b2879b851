"""Setup of jax for a command: the other processes, the compilation cache, the devices."""

import os
import resource
import sys
from pathlib import Path

import jax

from uoe_jax import runtime_env
from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.errors import UserError, os_error_as

# On GPUs: no kernel that adds in the order of arrival, and none chosen by its measured time.
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def start(config: Config, stops_itself: bool = False) -> None:
    """Connects to the other processes, watches them and sets up jax; UserError where that fails."""
    if cluster := coordination.join(stops_itself):
        watchdog.start(cluster, config.guard)
    runtime_env.check_variables(jax.lib.__version__)
    if config.train.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    try:
        jax.devices()
    except Exception as error:
        if coordination.lost_peer(error):
            raise
        raise runtime_env.no_device(error) from error
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(coordination.on_all(_cache_directory)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _cache_directory() -> Path:
    """The persistent compilation cache for this number of cores.

    XLA divides loops among the cores it finds, which JAX's cache key does not contain: a program
    compiled on one core ran up to 1.2 times as long on two as one compiled there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    directory = runtime_env.default_cache_dir() / f"jax_{cores}_cores"
    problem, remedy = f"{directory}: cannot be made", "set UOE_CACHE to another directory"
    with os_error_as(UserError, problem, remedy):
        directory.mkdir(mode=0o700, exist_ok=True)  # it holds native code
    return directory


def cost_of_determinism() -> str:
    """What train.deterministic does on these devices, for the user."""
    if (name := jax.default_backend()) != "gpu":
        return f"nothing to turn on for {name}, which is deterministic as it is: no cost"
    cost = "some kernels are slower (how much was not measured), and none is chosen by its time"
    return f"{_DETERMINISTIC}: {cost}"


def host_peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_devices() -> str:
    """'8 x NVIDIA H200 (2 processes)'."""
    kinds = sorted({d.device_kind for d in jax.devices()})
    several = f" ({jax.process_count()} processes)" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {', '.join(kinds)}{several}"
