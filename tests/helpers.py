"""Running the command line in a fresh process, and the small source that tests train on."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")


def write_source(folder: pathlib.Path, n_files: int = 200) -> pathlib.Path:
    """A directory of small Python files, the same on every machine."""
    folder.mkdir(parents=True)
    for i in range(n_files):
        body = "\n".join(f"def f{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(3 + i * 7 % 11))
        (folder / f"m{i:03}.py").write_text(f'"""Module {i}."""\n\n{body}')
    return folder


def environment(**extra: str) -> dict[str, str]:
    """One CPU device and this checkout first on the path."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **extra}
    env.pop("XLA_FLAGS", None)
    return env


def uoe_process(*args: str, **popen) -> subprocess.Popen:
    """`uoe ARGS` in a new process, output captured as text."""
    popen.setdefault("env", environment())
    return subprocess.Popen(
        [sys.executable, "-m", "uoe_jax", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def uoe(*args: str, **popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `uoe ARGS`."""
    process = uoe_process(*args, **popen)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metric_lines(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
