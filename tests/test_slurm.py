"""launch/slurm.sbatch: what it would run, anywhere; and (marked slurm) two tasks of `uoe train` on a real SLURM."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest
import slurm_cluster
from helpers import ROOT, TINY, environment, metric_lines, uoe, write_source

SCRIPT = str(ROOT / "launch" / "slurm.sbatch")


def sbatch_as_bash(*args: str, **env: str) -> tuple[int, str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        ["bash", SCRIPT, *args], env={**clean, **env}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_prints_the_command():
    code, out, err = sbatch_as_bash(
        "--dry-run", "--config=quickstart", "--workdir=runs/a b", SLURM_JOB_ID="9017"
    )
    assert code == 0, err
    words = shlex.split(out.replace("$'", "'"))
    assert words[:5] == ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", "bash", "-c"]
    assert words[6:] == [
        "uoe",
        "FIRST_NODE:61017",
        "FILE_FOR_THE_CODE",
        "--config=quickstart",
        "--workdir=runs/a b",
    ]


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((), "no arguments: give those of uoe train"),
        (
            ("--config=quickstart",),
            "SLURM_JOB_ID is not set: submit this file with sbatch, or give --dry-run",
        ),
    ],
)
def test_bad_input(args, sentence):
    code, out, err = sbatch_as_bash(*args)
    assert code == 2 and not out and sentence in err and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


class Jobs:
    """Submits launch/slurm.sbatch with two tasks and a program of ours as `uoe`."""

    def __init__(self, cluster, folder, program: str) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "bin").mkdir()
        (folder / "bin" / "uoe").write_text(program)
        (folder / "bin" / "uoe").chmod(0o755)
        env = environment(SLURM_CONF=cluster.env["SLURM_CONF"], UOE_CACHE=os.environ["UOE_CACHE"])
        self.env = {**env, "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def submit(self, name: str, *arguments: str) -> str:
        options = ("--ntasks=2", f"--output={self.folder}/{name}.out")
        return self.cluster.submit(*options, SCRIPT, *arguments, env=self.env, cwd=ROOT)

    def said(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""


STAND_IN = f"""#!{sys.executable} -S
import os, signal, sys, time
i = os.environ["UOE_PROCESS_ID"]
print("started", i, os.environ["UOE_PROCESSES"], os.environ["UOE_COORDINATOR"], sys.argv[1:], flush=True)
codes = sys.argv[2].split(",")
if codes[0] == "wait":
    asked = []
    for name in ("SIGTERM", "SIGUSR1")[: 1 + int(i)]:  # task 0 is not ready for SIGUSR1 yet, and dies of it
        signal.signal(getattr(signal, name), lambda number, frame: asked.append(number))
    print("waits", i, flush=True)
    while not asked:
        time.sleep(0.05)
    time.sleep(int(i))
    sys.exit(75)
time.sleep(0.3 * int(i))
sys.exit(int(codes[int(i)]))
"""


@pytest.mark.slurm
def test_which_ends_come_back(cluster, tmp_path):
    """With a stand-in for uoe: bad input and bad numbers do not, a stop does, a cancelled job does not."""
    jobs = Jobs(cluster, tmp_path, STAND_IN)
    for name, codes, expected in (
        ("input", "2,2", "2:0"),
        ("numbers", "76,76", "76:0"),
        ("done", "0,0", "0:0"),
    ):
        job = jobs.submit(name, codes)
        found = cluster.wait(job, "COMPLETED", "FAILED", timeout=60)
        assert (found["ExitCode"], found["Restarts"]) == (expected, "0"), jobs.said(name)
    said = jobs.said("done")
    for i in "01":
        assert f"started {i} 2 localhost:{61000 + int(job)} ['train', '0,0']" in said

    # One task ends a second before the other, of the signal itself: srun must not end the other, nor lose the code.
    job = jobs.submit("stop", "wait")
    slurm_cluster.until(lambda: jobs.said("stop").count("waits") == 2, cluster)
    cluster.run("scancel", "--signal=USR1", job)
    slurm_cluster.until(lambda: jobs.said("stop").count("waits") == 4, cluster)  # it is back
    assert f"job {job} ended with 75 and is put back into the queue (restart 1)" in jobs.said(
        "stop"
    )
    cluster.run("scancel", job)
    found = cluster.wait(job, "CANCELLED", timeout=60)
    assert found["Restarts"] == "1"
    slurm_cluster.until(lambda: not cluster.run("squeue", "-h"), cluster)
    assert cluster.job(job)["JobState"] == "CANCELLED" and jobs.said("stop").count("waits") == 4


@pytest.mark.slurm
def test_two_tasks_train_stop_and_go_on(cluster, tmp_path):
    """Two tasks give the losses of one process with two devices; stopped half-way, the job comes back by itself and ends
    with every measure the same, bit for bit, as one that nobody stopped."""
    jobs = Jobs(
        cluster, tmp_path, f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m uoe_jax "$@"\n'
    )
    train = (f"--config={TINY}", f"--config.data.path={write_source(tmp_path / 'source')}")

    whole = jobs.submit("whole", *train, f"--workdir={tmp_path / 'whole'}")
    two_devices = {
        **jobs.env,
        "XLA_FLAGS": jobs.env["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
    }
    code, _, err = uoe("train", *train, f"--workdir={tmp_path / 'alone'}", env=two_devices)
    assert code == 0, err
    found = cluster.wait(whole, "COMPLETED", "FAILED")
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "0"), jobs.said("whole")
    assert "2 x cpu (2 processes)" in jobs.said("whole")
    alone, together = losses(tmp_path / "alone"), losses(tmp_path / "whole")
    assert len(alone) == 23 and alone.keys() == together.keys()
    for key in alone:
        assert together[key] == pytest.approx(alone[key], rel=1e-5), key

    parts = jobs.submit("parts", *train, f"--workdir={tmp_path / 'parts'}")
    slurm_cluster.until(lambda: len(losses(tmp_path / "parts")) >= 4, cluster, seconds=120)
    cluster.run("scancel", "--signal=USR1", parts)
    slurm_cluster.until(lambda: cluster.job(parts)["Restarts"] == "1", cluster, seconds=60)
    found = cluster.wait(parts, "COMPLETED", "FAILED")
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), jobs.said("parts")
    said = jobs.said("parts")
    assert (
        "with everything saved" in said
        and "ended with 75 and is put back" in said
        and "resuming at step" in said
    )
    assert metric_lines(tmp_path / "parts") == metric_lines(tmp_path / "whole")


def losses(workdir) -> dict:
    """{(name, step): loss} of what a run has logged so far."""
    if not (workdir / "metrics.jsonl").exists():
        return {}
    lines = metric_lines(workdir)
    return {
        (k, line["step"]): line[k]
        for line in lines
        for k in ("train/loss", "eval/loss")
        if k in line
    }
