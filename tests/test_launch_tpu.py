"""launch/tpu_vm.sh against a stand-in for gcloud, which records what it is asked and plays the states of a slice.

Nothing here has talked to Google Cloud. What the stand-in answers follows the published reference of `gcloud compute tpus`
(queued-resources and tpu-vm); the workers' own part of the script is really run, each in a home of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from helpers import ROOT

SCRIPT = ROOT / "launch" / "tpu_vm.sh"
SLICE = ("--name=a", "--zone=z", "--type=v5litepod-8", "--runtime=v2-alpha-tpuv5-lite")
TRAIN = (
    "--",
    "--config=quickstart",
    "--workdir=gs://bucket/run",
    "--config.generate.prompt=two words",
)

GCLOUD = f"""#!{sys.executable} -S
import json, os, re, subprocess, sys
home = os.environ["FAKE"]
argv = sys.argv[1:]
with open(home + "/calls", "a") as f:
    f.write(json.dumps(argv) + "\\n")

def play(name, default):  # the next of the answers put down for a question; the last one stays
    path = home + "/" + name
    answers = open(path).read().split("\\n") if os.path.exists(path) else [default]
    if len(answers) > 1:
        open(path, "w").write("\\n".join(answers[1:]))
    return answers[0]

assert argv[:2] == ["compute", "tpus"], argv
group, verb = argv[2:4]
if verb == "describe":
    if "networkEndpoints" in argv[-1]:
        print("10.0.0.7;10.0.0.8")
    else:
        state = play(group, "MISSING")
        if state == "BROKEN":
            sys.exit("ERROR: (gcloud) you are not logged in")
        if state == "MISSING":
            sys.exit("ERROR: (gcloud.compute.tpus." + group + ".describe) NOT_FOUND: Resource was not found")
        print(state)
elif verb in ("create", "delete"):
    made = verb == "create"
    open(home + "/queued-resources", "w").write(play("then", "ACTIVE").replace(",", "\\n") if made else "MISSING")
    open(home + "/tpu-vm", "w").write("READY" if made else "MISSING")
elif verb == "ssh":
    worker = re.search("--worker=(\\\\w+)", " ".join(argv)).group(1)
    command = [a for a in argv if a.startswith("--command=")][0][10:]
    if os.path.exists(home + "/real"):  # runs what is sent, as each worker would
        for one in ("01" if worker == "all" else worker):
            for _ in range(2 if os.path.exists(home + "/twice" + one) else 1):  # gcloud repeats where a connection broke
                env = {{**os.environ, "HOME": home + "/" + one}}
                code = subprocess.run(["bash", "-c", command], env=env, cwd=env["HOME"]).returncode
        sys.exit(code)
    if "train-here" in command:
        print("line of worker " + worker)
        sys.exit(int(play("codes" + worker, "0")))
"""

UOE = """#!/usr/bin/env bash
trap 'echo saved; exit 75' TERM
echo "worker $UOE_PROCESS_ID trains"
ticks=$(cat ~/../ticks)
printf '%s\\n' "$UOE_COORDINATOR" "$UOE_PROCESSES" "$UOE_PROCESS_ID" "$@" >>~/got
exec 9<> <(:)
for _ in $(seq "$ticks"); do read -rt 0.1 -u 9 || true; done  # no child, which TERM would end as well
exit "$(cat ~/code)"
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs the script with the stand-in on PATH: cloud(action, *args) -> (code, out, err); cloud.calls() -> argv lists."""
    binary = tmp_path / "bin" / "gcloud"
    binary.parent.mkdir()
    binary.write_text(GCLOUD)
    binary.chmod(0o755)
    return Cloud(tmp_path)


class Cloud:
    def __init__(self, home) -> None:
        self.home = home
        self.env = {
            **os.environ,
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "FAKE": str(home),
            "UOE_POLL_S": "0",
        }

    def start(self, *args: str) -> subprocess.Popen:
        def heard() -> (
            None
        ):  # a shell cannot trap what is ignored when it starts, as SIGINT is below a shell's background job
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(
            ["bash", str(SCRIPT), *args], env=self.env, preexec_fn=heard, **piped
        )

    def __call__(self, *args: str) -> tuple[int, str, str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def set(self, name: str, *answers: str) -> None:
        (self.home / name).write_text("\n".join(answers))

    def calls(self) -> list[list[str]]:
        path = self.home / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What was done, without the looking."""
        short = {"scp": "scp", "ssh": "ssh", "create": "create", "delete": "delete"}
        found = []
        for call in self.calls():
            if call[3] == "ssh":
                found.append(
                    "train"
                    if "train-here" in call[-1]
                    else "install"
                    if "install-here" in call[-1]
                    else "ssh"
                )
            elif call[3] in short:
                found.append(short[call[3]])
        return found

    def ready(self) -> None:
        self.set("queued-resources", "ACTIVE")
        self.set("tpu-vm", "READY")


def test_makes_installs_and_trains(cloud):
    code, out, err = cloud(
        "run", *SLICE, "--spot", "--project=p", "--gcloud-create=--reserved", *TRAIN
    )
    assert code == 0, err
    assert cloud.verbs() == ["create", "scp", "install", "train", "train"]
    create = next(c for c in cloud.calls() if c[3] == "create")
    assert create[2:5] == ["queued-resources", "create", "--zone=z"]
    for flag in (
        "--project=p",
        "a",
        "--node-id=a",
        "--accelerator-type=v5litepod-8",
        "--spot",
        "--reserved",
    ):
        assert flag in create
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    trains = sorted((c for c in cloud.calls() if "train-here" in c[-1]), key=str)
    for i, call in enumerate(trains):
        assert f"--worker={i}" in call
        words = shlex.split(call[-1].removeprefix("--command="))
        assert words[:3] == ["bash", "uoe-src/launch/tpu_vm.sh", "train-here"]
        assert words[4:7] == ["10.0.0.7:8476", "2", str(i)]  # worker 0's address, how many, which
        assert words[7:] == list(TRAIN[1:])  # quoted so that two words stay one
    assert sorted(out.splitlines()) == ["[1] line of worker 1", "line of worker 0"]


def test_a_slice_that_is_there_is_used_again(cloud):
    cloud.ready()
    assert cloud("run", *SLICE, *TRAIN)[0] == 0
    assert cloud.verbs() == ["scp", "install", "train", "train"]


def test_waits_for_a_slice_on_its_way(cloud):
    cloud.set("queued-resources", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.set("tpu-vm", "CREATING", "READY")
    code, _, err = cloud("create", *SLICE)
    assert code == 0 and cloud.verbs() == []
    assert [line.split(": ")[2].strip() for line in err.splitlines()] == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE CREATING",
        "ACTIVE READY",
    ]


@pytest.mark.parametrize(
    "request_state, node",
    [("SUSPENDED", "READY"), ("ACTIVE", "PREEMPTED"), ("ACTIVE", "MISSING"), ("FAILED", "MISSING")],
)
def test_a_preempted_slice_is_made_again(cloud, request_state, node):
    cloud.set("queued-resources", request_state)
    cloud.set("tpu-vm", node)
    code, _, err = cloud("run", *SLICE, *TRAIN)
    assert code == 0, err
    assert cloud.verbs() == ["delete", "create", "scp", "install", "train", "train"]
    delete = next(c for c in cloud.calls() if c[3] == "delete")
    assert "--force" in delete and "--quiet" in delete


def test_preempted_while_training(cloud):
    """The connection breaks, the slice is gone: made again, installed again, gone on with."""
    cloud.ready()
    cloud.set("queued-resources", "ACTIVE", "SUSPENDED")
    cloud.set("codes0", "255", "0")
    cloud.set("codes1", "255", "0")
    code, _, err = cloud("run", *SLICE, *TRAIN)
    assert code == 0, err
    assert cloud.verbs() == [
        "scp",
        "install",
        "train",
        "train",
        "delete",
        "create",
        "scp",
        "install",
        "train",
        "train",
    ]


def test_stopped_with_everything_saved_is_started_again(cloud):
    cloud.ready()
    cloud.set("codes0", "75", "75", "0")
    cloud.set("codes1", "75", "75", "0")
    code, _, err = cloud("run", *SLICE, *TRAIN)
    assert code == 0 and cloud.verbs() == ["scp", "install", *["train"] * 6], err


@pytest.mark.parametrize("codes, expected", [("2 77", 2), ("77 76", 76), ("76 76", 76)])
def test_what_would_only_come_again_is_not_retried(cloud, codes, expected):
    cloud.ready()
    for i, code in enumerate(codes.split()):
        cloud.set(f"codes{i}", code)
    assert cloud("run", *SLICE, *TRAIN)[0] == expected
    assert cloud.verbs().count("train") == 2


@pytest.mark.parametrize("codes, expected", [("77 1", 1), ("75 134", 134)])
def test_other_failures_are_retried_a_few_times(cloud, codes, expected):
    cloud.ready()
    for i, code in enumerate(codes.split()):
        cloud.set(f"codes{i}", code)
    assert cloud("run", *SLICE, *TRAIN)[0] == expected
    assert cloud.verbs().count("train") == 2 * 4


def test_a_request_that_fails_is_not_repeated(cloud):
    cloud.set("then", "PROVISIONING,FAILED")
    code, _, err = cloud("create", *SLICE)
    assert code == 1 and "the request failed" in err
    assert cloud.verbs() == ["create"]


def test_an_error_of_gcloud_is_shown(cloud):
    cloud.set("queued-resources", "BROKEN")
    code, _, err = cloud("create", *SLICE)
    assert code == 1 and "you are not logged in" in err
    assert cloud.verbs() == []


def test_status_ssh_delete(cloud):
    cloud.ready()
    assert cloud("status", *SLICE)[1] == "request: ACTIVE\nslice: READY\n"
    assert (
        cloud("ssh", *SLICE, "--gcloud-ssh=--internal-ip", "--", "--worker=1", "--command=ls")[0]
        == 0
    )
    assert cloud.calls()[-1][3:] == [
        "ssh",
        "--zone=z",
        "a",
        "--internal-ip",
        "--worker=1",
        "--command=ls",
    ]
    assert cloud("delete", *SLICE)[0] == 0 and cloud.verbs() == ["ssh", "delete"]
    code, _, err = cloud("delete", *SLICE)
    assert code == 0 and "there is none" in err and cloud.verbs() == ["ssh", "delete"]


@pytest.mark.parametrize("action", ["run", "create", "status", "delete", "ssh"])
def test_a_dry_run_runs_nothing(cloud, action):
    code, out, err = cloud(action, *SLICE, "--dry-run", *(TRAIN if action == "run" else ()))
    assert code == 0 and cloud.calls() == [], err
    assert all("gcloud compute tpus " in line for line in out.splitlines())
    if action == "run":
        assert [shlex.split(line)[3:5] for line in out.splitlines()] == [
            ["queued-resources", "describe"],
            ["tpu-vm", "describe"],
            ["queued-resources", "create"],
            ["tpu-vm", "scp"],
            ["tpu-vm", "ssh"],
            ["tpu-vm", "describe"],
            *[["tpu-vm", "ssh"]] * 3,
        ]


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((), "command '': give run, create, status, ssh or delete"),
        (("ruin",), "command 'ruin': give run"),
        (("status", "--name=A_1", "--zone=z"), "--name=A_1: give a name of a-z, 0-9 and -"),
        (("status", "--name=a"), "--zone is missing: give the zone"),
        (("create", "--name=a", "--zone=z"), "--type is missing"),
        (("create", "--name=a", "--zone=z", "--type=t"), "--runtime is missing"),
        (("status", "--nam=a"), "--nam=a: unknown option"),
        (
            ("run", *SLICE, "--", "--config=x", "--workdir=runs/a"),
            "--workdir=runs/a: would go with the slice; give --workdir=gs://",
        ),
        (
            ("run", *SLICE, "--", "--config=/x.py", "--workdir=gs://b/a"),
            "--config=/x.py: give a path below",
        ),
    ],
)
def test_bad_input(cloud, args, sentence):
    code, out, err = cloud(*args)
    assert code == 2 and not out and sentence in err and len(err.splitlines()) == 1
    assert cloud.calls() == []


# ---- the workers' own part, really run ----


@pytest.fixture
def workers(cloud):
    """Two homes with the script and a `uoe` that notes its environment, runs `ticks` tenths of a second and ends with `code`."""
    cloud.ready()
    cloud.set("real")
    cloud.set("ticks", "3")
    for i in "01":
        for folder in ("uoe-src/launch", "uoe-env/bin"):
            (cloud.home / i / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, cloud.home / i / "uoe-src/launch")
        (cloud.home / i / "uoe-env/bin/uoe").write_text(UOE)
        (cloud.home / i / "uoe-env/bin/uoe").chmod(0o755)
        (cloud.home / i / "code").write_text("0")
    # What is sent to install takes a network and replaces the above; its archive is looked at in a test of its own.
    gcloud = (cloud.home / "bin/gcloud").read_text()
    gcloud = gcloud.replace(
        'elif verb == "ssh":', 'elif verb == "ssh" and "install-here" not in argv[-1]:'
    )
    (cloud.home / "bin/gcloud").write_text(gcloud)
    return cloud


def got(cloud, worker: int) -> list[str]:
    return (cloud.home / str(worker) / "got").read_text().splitlines()


def test_each_worker_gets_its_place(workers):
    code, out, err = workers("run", *SLICE, *TRAIN)
    assert code == 0, err
    for i in (0, 1):
        assert got(workers, i) == ["10.0.0.7:8476", "2", str(i), "train", *TRAIN[1:]]
    assert sorted(out.splitlines()) == ["[1] worker 1 trains", "worker 0 trains"]


def test_the_code_of_a_worker_comes_back(workers):
    (workers.home / "1/code").write_text("76")
    assert workers("run", *SLICE, *TRAIN)[0] == 76


def test_a_repeated_command_follows_the_run_that_goes_on(workers):
    workers.set("twice1")
    code, out, _ = workers("run", *SLICE, *TRAIN)
    assert code == 0 and len(got(workers, 1)) == 7  # started once
    assert out.count("[1] worker 1 trains") == 2  # shown twice


def wait_for(cloud, n: int) -> None:
    deadline = time.monotonic() + 20
    got = [cloud.home / i / "got" for i in "01"]
    while not all(path.exists() and path.read_text().count("gs://") >= n for path in got):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_stops_the_run_with_everything_saved(workers):
    workers.set("ticks", "600")
    process = workers.start("run", *SLICE, *TRAIN)
    wait_for(workers, 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "stopping; everything is saved first" in err
    assert sorted(out.splitlines()) == [
        "[1] saved",
        "[1] worker 1 trains",
        "saved",
        "worker 0 trains",
    ]


def test_a_run_that_was_left_alone_is_stopped_before_the_next(workers):
    """The launcher dies: the run goes on. The same command stops it, which saves, and goes on from there."""
    workers.set("ticks", "600")
    process = workers.start("run", *SLICE, *TRAIN)
    wait_for(workers, 1)
    process.kill()
    process.wait()
    workers.set("ticks", "3")
    code, out, err = workers("run", *SLICE, *TRAIN)
    assert code == 0, err
    for i in "01":
        logs = [p.read_text() for p in sorted((workers.home / i / ".uoe-run").glob("*.log"))]
        assert logs == [f"worker {i} trains\nsaved\n", f"worker {i} trains\n"]


def test_what_is_installed(cloud):
    """The archive holds the package and the config, and no more of this checkout."""
    cloud.ready()
    keep = 'import shutil\nif verb == "scp": shutil.copy(argv[5], home)\n'
    gcloud = (
        (cloud.home / "bin/gcloud")
        .read_text()
        .replace("group, verb = argv[2:4]\n", "group, verb = argv[2:4]\n" + keep)
    )
    (cloud.home / "bin/gcloud").write_text(gcloud)
    assert (
        cloud("run", *SLICE, "--", "--config=tests/tiny.py:accumulate", "--workdir=gs://b/a")[0]
        == 0
    )
    with tarfile.open(cloud.home / "uoe-src.tgz") as archive:
        names = set(archive.getnames())
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "uoe_jax/cli.py",
        "configs/quickstart.py",
        "tests/tiny.py",
    } <= names
    assert "launch/tpu_vm.sh" in names and "tests/helpers.py" not in names
    assert not [n for n in names if "__pycache__" in n]
