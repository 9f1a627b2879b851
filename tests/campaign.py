"""Kills a run at random moments until it has ended, and compares it with one that nobody disturbed.

    python tests/campaign.py --kills=30 --processes=1            # some minutes
    python tests/campaign.py --kills=30 --processes=2 --seed=1

A third of the kills (SIGKILL, to all processes) come while a checkpoint is being written, a third while an evaluation runs,
and a third at any moment, start-up and compilation included. Then every line of metrics.jsonl (timings aside) and every bit
of the last checkpoint are compared. tests/test_campaign.py runs a short form. Exit code: 0 equal, 1 not.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import tempfile
import time
from collections import Counter

from helpers import (
    TINY,
    checkpoint_bytes,
    environment,
    finish,
    metric_lines,
    uoe_together,
    write_source,
)

STEPS = 60


def command(source: pathlib.Path, workdir: pathlib.Path) -> tuple[str, ...]:
    more = (
        f"--config.train.steps={STEPS}",
        "--config.checkpoint.every=3",
        "--config.eval.every=4",
        "--config.eval.batches=0",
    )
    return (
        "train",
        f"--config={TINY}",
        f"--config.data.path={source}",
        f"--workdir={workdir}",
        *more,
    )


def start(processes: int, args: tuple[str, ...], trace: pathlib.Path) -> list:
    """The run, each process of which keeps what it is doing in a file."""
    each = [
        {"UOE_TRACE": f"{trace}.{i}", "UOE_CACHE": environment().get("UOE_CACHE", "")}
        for i in range(processes)
    ]
    return uoe_together(processes, 1, *args, each_env=each, faults="none")


def wait_for(
    moment: str,
    seconds: float,
    rng: random.Random,
    started: list,
    trace: pathlib.Path,
    workdir: pathlib.Path,
) -> str:
    """Returns in a random moment of the kind asked for, with what the run was doing; "ended" where it ended before."""
    at = time.monotonic() + seconds
    times, seen = rng.randrange(1, 4), 0
    before = doing = ""
    while all(p.poll() is None for p in started):
        try:
            doing = pathlib.Path(f"{trace}.0").read_text()
        except OSError:
            doing = "starting"
        writing = any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        now = "saving" if writing else "evaluation" if doing.startswith("evaluation") else "other"
        seen += now == moment and now != before
        before = now
        if (moment == "any" and time.monotonic() > at) or (now == moment and seen >= times):
            time.sleep(rng.uniform(0, 0.02))
            return "a save" if writing else doing.partition(" ")[0] or "start-up"
        time.sleep(0.001)
    return "ended"


def campaign(
    processes: int, kills: int, seed: int, folder: pathlib.Path, say=print
) -> tuple[bool, Counter]:
    """(whether every disturbed run equals the undisturbed one, how many kills came in what)."""
    rng = random.Random(seed)
    source = write_source(folder / "source")
    whole, run = folder / "whole", folder / "run"
    began = time.monotonic()
    ended = finish(start(processes, command(source, whole), folder / "trace"))
    lasts = time.monotonic() - began
    assert [code for code, _, _ in ended] == [0] * processes, ended
    came, same = Counter(), True
    while sum(came.values()) < kills:
        moment = ("saving", "evaluation", "any")[sum(came.values()) % 3]
        started = start(processes, command(source, run), folder / "trace")
        doing = wait_for(moment, rng.uniform(0, lasts), rng, started, folder / "trace", run)
        rng.shuffle(started)
        for process in started:
            process.kill()
        finish(started)
        if doing == "ended":  # before its moment came: the next kills are for a run of their own
            same = same and ends_equal(processes, whole, run, source, folder)
            run = folder / f"run{sum(came.values())}"
            continue
        came[doing] += 1
        say(
            f"killed while in {doing}, {time.monotonic() - began:.0f} s; metrics reach step {last_step(run)}"
        )
    return same and ends_equal(processes, whole, run, source, folder), came


def last_step(run: pathlib.Path) -> int:
    try:
        return metric_lines(run)[-1]["step"]
    except (OSError, IndexError, ValueError):
        return 0


def ends_equal(
    processes: int,
    whole: pathlib.Path,
    run: pathlib.Path,
    source: pathlib.Path,
    folder: pathlib.Path,
) -> bool:
    """Lets the run end, and compares."""
    ended = finish(start(processes, command(source, run), folder / "trace"))
    assert [code for code, _, _ in ended] == [0] * processes, ended
    a, b = checkpoint_bytes(whole, STEPS), checkpoint_bytes(run, STEPS)
    same = metric_lines(whole) == metric_lines(run) and a.keys() == b.keys()
    return same and all(a[name].tobytes() == b[name].tobytes() for name in a)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        same, moments = campaign(
            options.processes, options.kills, options.seed, pathlib.Path(scratch)
        )
    print(
        f"{sum(moments.values())} kills on {options.processes} processes ({dict(moments)}): {'equal' if same else 'DIFFERENT'}"
    )
    sys.exit(0 if same else 1)
