"""Running the command line in a fresh process, and the small source that tests train on."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from uoe_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
# Machine code of tiny programs takes much longer to make than it runs: it is not optimised, and made the short way where
# jaxlib still has two (half the time of a compilation).
QUICK_CODE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)


def slow(*values):
    """A row of a table of tests that has the mark `slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def write_source(folder: pathlib.Path, n_files: int = 200) -> pathlib.Path:
    """A directory of small Python files, the same on every machine."""
    folder.mkdir(parents=True)
    for i in range(n_files):
        body = "\n".join(
            f"def f{i}_{j}(x):\n    return x * {j} + {i}\n" for j in range(3 + i * 7 % 11)
        )
        (folder / f"m{i:03}.py").write_text(f'"""Module {i}."""\n\n{body}')
    return folder


def environment(**extra: str) -> dict[str, str]:
    """One CPU device and this checkout first on the path."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_CODE,
        **extra,
    }


def uoe_process(*args: str, faults: str | None = None, **popen) -> subprocess.Popen:
    """`uoe ARGS` in a new process, output captured as text; faults: of tests/faulty.py."""
    popen.setdefault("env", environment())
    program = ["-m", "uoe_jax"] if faults is None else [str(ROOT / "tests" / "faulty.py"), faults]
    return subprocess.Popen(
        [sys.executable, *program, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


def uoe_together(
    processes: int, devices: int, *args: str, each=None, each_env=None, **popen
) -> list[subprocess.Popen]:
    """`uoe ARGS` in several processes of `devices` CPU devices that meet each other.

    each, each_env: more arguments and environment by process. faults: of tests/faulty.py, which finds its own in there.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{QUICK_CODE} --xla_force_host_platform_device_count={devices}"
    place = dict(UOE_COORDINATOR=address, UOE_PROCESSES=str(processes))
    started = []
    for i in range(processes):
        env = {
            **environment(**place, UOE_PROCESS_ID=str(i)),
            "XLA_FLAGS": flags,
            **(each_env[i] if each_env else {}),
        }
        started.append(uoe_process(*args, *(each[i] if each else ()), env=env, **popen))
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; none survives the wait."""
    try:
        with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda p: p.communicate(timeout=timeout), processes))
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs)]


def wait_for_step(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    """Returns when a running `uoe train` has logged `step` steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if metric_lines(workdir)[-1]["step"] >= step:
                return
        except (OSError, IndexError, ValueError):
            pass
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run made no progress")


def uoe(*args: str, **popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `uoe ARGS`."""
    process = uoe_process(*args, **popen)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metric_lines(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def sentence(capsys, *args):
    """The one line that `uoe ARGS` prints on its way to exit code 2."""
    assert cli.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("uoe: ") and err.count("\n") == 1, err
    return err


def checkpoint_bytes(workdir, step):
    """Every array of a checkpoint, as numpy, whatever devices it was saved on."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir.resolve() / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(path).item_metadata.tree,
        )
        tree = reader.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree.leaves_with_path(tree)}


def assert_same_run(one, other, step):
    assert metric_lines(one) == metric_lines(other)
    a, b = checkpoint_bytes(one, step), checkpoint_bytes(other, step)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name
