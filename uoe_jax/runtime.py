"""How jax is set up for a command: the other processes, the compilation cache, and which devices there are."""

from __future__ import annotations

import os

import jax

from uoe_jax import processes
from uoe_jax.data.pipeline import default_cache_dir


def start(stops_itself: bool = False) -> None:
    """Meets the other processes (`processes.join`), and turns the persistent compilation cache on, in a folder only its owner can read; JAX_COMPILATION_CACHE_DIR wins."""
    processes.join(stops_itself)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = processes.together(default_cache_dir) / "jax"
        folder.mkdir(mode=0o700, exist_ok=True)  # it holds native code: never a shared folder
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def describe_devices() -> str:
    """'8 x NVIDIA H200 (2 processes)'."""
    kinds = sorted({d.device_kind for d in jax.devices()})
    processes = f" ({jax.process_count()} processes)" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {', '.join(kinds)}{processes}"
