"""launch/local.py with small programs: the environment of the processes, and that none is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from uoe_jax import errors

LOCAL = ROOT / "launch" / "local.py"
PYTHON = (sys.executable, "-S", "-c")  # starts in a moment
RECORD = """
import json, os, sys
with open(sys.argv[1] + os.environ["UOE_PROCESS_ID"], "w") as f:
    json.dump([os.getsid(0) == os.getpid(), dict(os.environ)], f)
"""
EXIT = "import os, sys; i = os.environ['UOE_PROCESS_ID']; sys.exit(int(sys.argv[1:][int(i)]))"
SPEAK = """
import os, sys
i = os.environ["UOE_PROCESS_ID"]
print("a" + i)
print("b" + i, end="")
print("e" + i, file=sys.stderr)
"""
# Waits for a signal, of which it writes the name; says first that it is ready, by a file.
WAIT = """
import os, signal, sys, time
got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
me = sys.argv[1] + os.environ["UOE_PROCESS_ID"]
open(me, "w").write(str(os.getpid()))
while not got:
    time.sleep(0.01)
time.sleep(0.1)
open(me + ".got", "w").write(" ".join(got))
sys.exit(75)
"""
FAIL_OR_HANG = """
import os, signal, sys, time
if os.environ["UOE_PROCESS_ID"] == "1":
    sys.exit(3)
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
"""


def start(*args: str, **popen) -> subprocess.Popen:
    command = [sys.executable, str(LOCAL), *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def local(*args: str, **popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of launch/local.py."""
    process = start(*args, **popen)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_until(true, what: str) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def both_wait(folder) -> bool:
    """Whether processes 0 and 1 run WAIT and have written their ids."""
    return all((folder / i).exists() and (folder / i).read_text() for i in "01")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits for its parent to notice its end does not."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_process_gets_its_place(tmp_path):
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=7",
    }
    code, _, err = local(
        "--processes=3", "--devices=4", "--", *PYTHON, RECORD, f"{tmp_path}/", env=env
    )
    assert code == 0, err
    places = [json.loads((tmp_path / str(i)).read_text()) for i in range(3)]
    for i, (own_session, env) in enumerate(places):
        assert own_session  # else a Ctrl-C in a terminal would arrive twice
        assert env["UOE_PROCESS_ID"] == str(i) and env["UOE_PROCESSES"] == "3"
        assert env["UOE_COORDINATOR"] == places[0][1]["UOE_COORDINATOR"]
        assert env["JAX_PLATFORMS"] == "cpu"
        assert (
            env["XLA_FLAGS"]
            == "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=4"
        )
    host, port = places[0][1]["UOE_COORDINATOR"].split(":")
    assert host == "127.0.0.1" and 1024 <= int(port) < 65536


def test_lines_of_the_others_are_marked():
    code, out, err = local("--processes=3", "--", *PYTHON, SPEAK)
    assert code == 0
    assert sorted(out.replace("b0", "b0\n").split("\n")) == sorted(
        ["a0", "b0", "[1] a1", "[1] b1", "[2] a2", "[2] b2", ""]
    )
    assert sorted(err.splitlines()) == ["[1] e1", "[2] e2", "e0"]


@pytest.mark.parametrize(
    "codes, expected",
    [
        ("0 0", 0),
        ("0 75", 75),
        ("75 75 75", 75),
        ("2 2", 2),
        ("0 76", 76),
        ("75 77", 77),
        ("1 0 75", 1),
    ],
)
def test_exit_codes(codes, expected):
    each = codes.split()
    code, _, err = local(f"--processes={len(each)}", "--grace=5", "--", *PYTHON, EXIT, *each)
    assert code == expected, err
    assert ("ended with" in err) == (expected not in (0, 75))


def test_the_cause_is_kept_apart_from_what_follows():
    """A process that lost a peer is not the one that failed first, even where both are noticed at once."""
    module = load()
    launch = module.Launch(["x"], [{}, {}], 1.0)
    launch.children = [Ended(77), Ended(76)]
    assert launch.wait() == 76


class Ended:
    """A child that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode, self.pid = code, 2**30  # no process has this id

    def poll(self) -> int:
        return self.returncode


def load():
    """launch/local.py as a module."""
    spec = importlib.util.spec_from_file_location("launch_local", LOCAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_codes_mean_what_the_package_means():
    module = load()
    for name in ("EXIT_DONE", "EXIT_BAD_INPUT", "EXIT_STOPPED", "EXIT_LOST_PEER"):
        assert getattr(module, name) == getattr(errors, name)


@pytest.mark.parametrize("kind", ["obedient", "stubborn"])
def test_one_failure_ends_all(kind):
    """SIGTERM after the grace, SIGKILL for who ignores it; the code is that of who failed."""
    code = f"import sys; sys.path.insert(0, {str(LOCAL.parent)!r}); import local; local._TERM_S = 0.3; sys.exit(local.main())"
    since = time.monotonic()
    command = [
        sys.executable,
        "-c",
        code,
        "--processes=3",
        "--grace=0.3",
        "--",
        *PYTHON,
        FAIL_OR_HANG,
        kind,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert time.monotonic() - since < 10
    assert "process 1 ended with 3; the other 2 get 0.3 s to end" in done.stderr


def test_a_killed_process_gives_128_and_the_signal(tmp_path):
    process = start("--processes=2", "--grace=0.1", "--", *PYTHON, WAIT, f"{tmp_path}/")
    wait_until(lambda: both_wait(tmp_path), "not started")
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    assert process.wait(timeout=20) == 137


@pytest.mark.parametrize(
    "sent, arrives", [*((s, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1")), ("SIGHUP", "SIGTERM")]
)
def test_signals_are_passed_on(tmp_path, sent, arrives):
    process = start("--processes=2", "--", *PYTHON, WAIT, f"{tmp_path}/")
    wait_until(lambda: both_wait(tmp_path), "not started")
    process.send_signal(getattr(signal, sent))
    assert process.wait(timeout=20) == 75
    assert [(tmp_path / f"{i}.got").read_text() for i in "01"] == [arrives] * 2  # once


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path):
    process = start("--processes=2", "--", *PYTHON, WAIT, f"{tmp_path}/")
    wait_until(lambda: both_wait(tmp_path), "not started")
    pids = [int((tmp_path / i).read_text()) for i in "01"]
    process.kill()
    wait_until(lambda: not any(map(is_alive, pids)), "a process outlived its launcher")
    assert not list(tmp_path.glob("*.got"))  # killed, not asked


def test_what_a_process_leaves_behind_is_ended(tmp_path):
    code, _, err = local(
        "--processes=2", "--", "bash", "-c", f"sleep 1000 & echo $! > {tmp_path}/$UOE_PROCESS_ID"
    )
    assert code == 0, err
    pids = [int((tmp_path / i).read_text()) for i in "01"]
    wait_until(lambda: not any(map(is_alive, pids)), "a grandchild was left")


def test_dry_run(tmp_path):
    code, out, _ = local(
        "--processes=2", "--devices=3", "--dry-run", "--", "touch", f"{tmp_path}/a b"
    )
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2 and not list(tmp_path.iterdir())
    for i, line in enumerate(lines):
        assert f"UOE_PROCESSES=2 UOE_PROCESS_ID={i} " in line and "device_count=3" in line
        assert line.endswith(f"touch '{tmp_path}/a b'")
    assert (
        subprocess.run(lines[0], shell=True).returncode == 0 and (tmp_path / "a b").exists()
    )  # can be pasted


def test_gpus_are_dealt_out():
    args = ("--processes=2", "--devices=2", "--platform=gpu", "--dry-run", "--", "true")
    code, out, err = local(*args, env={**os.environ, "CUDA_VISIBLE_DEVICES": "3,1,GPU-x,0,2"})
    assert code == 0, err
    first, second = out.splitlines()
    assert "CUDA_VISIBLE_DEVICES=3,1 " in first and "CUDA_VISIBLE_DEVICES=GPU-x,0 " in second
    assert "JAX_PLATFORMS=cuda" in first


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((), "the following arguments are required: --processes"),
        (("--processes=0", "--", "true"), "--processes=0: give 1 or more"),
        (("--processes=two", "--", "true"), "argument --processes: invalid int value: 'two'"),
        (("--processes=2", "--devices=-1", "--", "true"), "--devices=-1: give 1 or more"),
        (("--processes=2", "--grace=nan", "--", "true"), "--grace=nan: give 0 or more seconds"),
        (("--processes=2",), "no command: put it after --"),
        (("--processes=2", "true"), "unrecognized arguments: true"),
        (
            ("--processes=2", "--", "/no/such/program"),
            "/no/such/program: no such program; give a path",
        ),
        (("--processes=2", "--", str(ROOT / "LICENSE")), "LICENSE: no such program"),
        (
            ("--processes=4", "--platform=gpu", "--", "true"),
            "CUDA_VISIBLE_DEVICES=0,1,2 has 3 GPUs; ask for at most that many",
        ),
    ],
)
def test_bad_input(args, sentence):
    code, out, err = local(*args, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2"})
    assert code == 2 and not out
    assert sentence in err and len(err.splitlines()) == 1, err
