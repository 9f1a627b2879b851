"""A SLURM cluster of one node on this machine: the real munged, slurmctld and slurmd, as root, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from typing import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")

# No accounting, no cgroups; two CPUs, whether there are as many or not. cred_expire: a job that is put back waits until its
# old credentials have expired: two minutes by default, five seconds at least.
CONFIG = """
ClusterName=uoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=10
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """What a user of the cluster can do."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, **popen) -> str:
        """What a client of SLURM prints."""
        env = {**self.env, **popen.pop("env", {})}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **popen)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *arguments: str, **popen) -> str:
        """sbatch; returns the job's id."""
        return self.run("sbatch", "--parsable", *arguments, **popen).strip().partition(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job))
        )

    def wait(self, job: str, *states: str, timeout: float = 180) -> dict[str, str]:
        """Until the job is in one of the states; its fields then."""
        deadline = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def logs(self) -> str:
        """The ends of the daemons' logs, for who reads a failure."""
        return "\n".join(
            f"{p.name}:\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log"))
        )


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Cluster]:
    """The cluster, ready for jobs; its daemons and all their jobs are gone afterwards."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    assert not missing, f"{', '.join(missing)}: not installed; .ci/run names the Debian packages"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    config = CONFIG.format(host=host, folder=folder, controller=_free_port(), node=_free_port())
    (folder / "slurm.conf").write_text(config)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    cluster = Cluster(folder)
    files = [f"--{n}-file={folder}/munge.{n}" for n in ("key", "pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
    commands = (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "localhost"])
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out.log").open("w") as out:
                daemons.append(
                    subprocess.Popen(
                        command, env=cluster.env, stdout=out, stderr=out, start_new_session=True
                    )
                )
            if command[0] == "munged":
                until((folder / "munge.socket").exists, cluster)
        ask = dict(
            args=["sinfo", "-h", "-o", "%t"], env=cluster.env, capture_output=True, text=True
        )
        until(lambda: "idle" in subprocess.run(**ask).stdout, cluster)
        yield cluster
    finally:
        if len(daemons) == len(commands):
            subprocess.run(
                ["scancel", "--signal=KILL", "--full", "--user=root"], env=cluster.env, timeout=30
            )
            subprocess.run(["scancel", "--user=root"], env=cluster.env, timeout=30)
            with contextlib.suppress(AssertionError):
                until(lambda: not cluster.run("squeue", "-h"), cluster)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(true, cluster: Cluster, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.1)
