"""`uoe compare`: trains every row of a table with every seed and measures the rows side by side.

Every run is an ordinary `uoe train` in a process of its own, with a workdir of its own: it resumes
where it was stopped, and can be evaluated or exported like any other. A finished run is not
started again. `workspace` lists the files. Two more processes leave the devices to the runs:

    python -m uoe_jax.compare.run check CONFIG       whether a run can start; CONFIG is JSON
    python -m uoe_jax.compare.run measure WORKDIR    after the runs; writes WORKDIR/measured.json
"""

import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Iterator, NamedTuple, Self, Sequence

from etils import epath

from uoe_jax import errors, runtime_env
from uoe_jax.compare import workspace as files
from uoe_jax.compare.table import Row, Table
from uoe_jax.config.load import changed_keys, from_dict, to_dict
from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import locate, lock, os_errors, release, wait_for_writer, write_json

ORPHAN_S = 120  # for a run whose table was killed to end its step and save
FIXED = ("match", "reference", "learning_rates", "search_steps")  # keys finished rows depend on
# A run alone may change these when it resumes. In a table they settle what is measured, on which
# checkpoint, and after how many steps.
MEASURES = ("eval.test", "eval.every", "checkpoint.every", "checkpoint.keep_best", "train.steps")


class PlannedRun(NamedTuple):
    """One run."""

    row: Row
    config: Config
    workdir: epath.Path
    what: str  # its name for the user


class Ended(Exception):
    """A child was asked to stop, or refused its input and has printed why; holds the exit code."""


def compare(table: Table, workdir_name: str) -> int:
    """Trains and measures what is missing of a table; the exit code is 75 when asked to stop."""
    if coordination.are_several():
        why = "one process makes a table, on all devices of one machine"
        raise UserError(f"--workdir={workdir_name}: {why}; start this once, and not by srun")
    workdir = locate(workdir_name)
    try:
        with Children() as children:
            _prepare(table, workdir_name, workdir, children)
            rates = search_rates(table, workdir, children)
            for run in planned_runs(table, workdir, rates):
                train(run, children)
            measure(table, workdir, children)
    except Ended as ended:
        return ended.args[0]
    finally:
        release(workdir)
    return errors.EXIT_DONE


def _prepare(table: Table, name: str, workdir: epath.Path, children: "Children") -> None:
    """Makes, locks and claims the workdir; a new one only after devices and data were checked."""
    problem = f"--workdir={name}: cannot be written"
    with errors.os_error_as(UserError, problem, "give a directory you may write to"):
        with os_errors(name):
            is_new = not (workdir / files.TABLE).exists()
        runtime_env.default_cache_dir()  # an unusual one goes into the environment of the runs
        if is_new:
            check = ["uoe_jax.compare.run", "check", json.dumps(to_dict(table.reference.config))]
            children.run(check, "looking at devices and data")
        with os_errors(name):
            workdir.mkdir(parents=True, exist_ok=True)
            lock(name, workdir)
            claim(table, workdir)


def claim(table: Table, workdir: epath.Path) -> None:
    """Writes table.json, or checks that it is of the same table; seeds and rows may be added."""
    path, own = workdir / files.TABLE, dataclasses.asdict(table.config)
    known = files.read_table(workdir) or {**own, "rows": {}}
    try:
        stored, fixed = known["rows"], {key: known[key] for key in FIXED}
        configs = {slug: from_dict(dict(row["config"])) for slug, row in stored.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no table of uoe compare; {files.DAMAGED}") from error
    for key, old in fixed.items():
        if old != own[key]:
            remedy = f"the table in this workdir has {old!r}; give that, or another --workdir"
            raise ConfigError(f"config.{key}", own[key], remedy)
    for r in table.rows:
        for key, old, new in changed_keys(configs.get(r.slug, r.config), r.config, MEASURES):
            why = f"the row {r.name!r} of the table in this workdir has {old!r}"
            remedy = f"{why}, from its config or preset then; give that, or another --workdir"
            raise ConfigError(f"config.base.{key}", new, remedy)
        # Rows left out of this call (--config.rows) stay, and are in the table if finished.
        about = {"name": r.name, "preset": r.preset, "miss": r.miss}
        stored[r.slug] = {**about, "config": to_dict(r.config)}
    write_json(path, {**own, "rows": stored})


def planned_runs(table: Table, workdir: epath.Path, rates: files.Rates) -> Iterator[PlannedRun]:
    """Seed by seed, so that a table that is stopped early holds all rows."""
    for seed in range(table.config.seeds):
        for row in table.rows:
            if rates.get(row.slug, 0.0) is not None:  # None: all learning rates diverged
                config = _with(row.config, rates.get(row.slug), seed=seed)
                what = f"{row.name}, seed {seed}"
                yield PlannedRun(row, config, files.seed_dir(workdir, row.slug, seed), what)


def search_rates(table: Table, workdir: epath.Path, children: "Children") -> files.Rates:
    """The learning rate of every row that is best on validation in a short run."""
    known = files.read_losses(workdir)
    for row in table.rows:
        losses = known.setdefault(row.slug, {})
        for rate in table.rates:
            if str(rate) not in losses:
                config = _with(row.config, rate, steps=table.search_steps)
                place = workdir / "rows" / row.slug / f"rate_{rate:g}"
                what = f"{row.name}, learning rate {rate:g}"
                train(PlannedRun(row, config, place, what), children)
                lines = [] if files.diverged(place) else read_metrics(place)
                found = [line["eval/loss"] for line in lines if "eval/loss" in line]
                losses[str(rate)] = found[-1] if found and math.isfinite(found[-1]) else None
                write_json(workdir / files.RATES, known)
    return files.best_rates(known)


def _with(config: Config, rate: float | None, seed: int = 0, steps: int = 0) -> Config:
    """A config with a learning rate, a seed and a number of steps; a shorter run is not tested."""
    values = to_dict(config)
    values["train"].update(seed=seed, report=False)
    values["optimizer"]["learning_rate"] = rate or config.optimizer.learning_rate
    if steps:
        values["train"]["steps"] = steps
        warmup = min(config.optimizer.warmup_steps, max(1, steps // 10))
        values["optimizer"]["warmup_steps"] = warmup
        values["eval"]["test"] = False
    return from_dict(values)


def train(run: PlannedRun, children: "Children") -> None:
    """Trains a run to its end. One whose numbers went bad is marked, and done."""
    if files.is_finished(run.config, run.workdir) or files.diverged(run.workdir):
        return
    wait_for_writer(run.workdir, ORPHAN_S, lambda: children.stopped)
    run.workdir.parent.mkdir(parents=True, exist_ok=True)
    file = run.workdir.with_name(f"{run.workdir.name}.json")
    write_json(file, to_dict(run.config))
    command = ["uoe_jax", "train", f"--config={file}", f"--workdir={run.workdir}"]
    if children.run(command, run.what) == errors.EXIT_BAD_NUMBERS:
        (run.workdir / files.DIVERGED).touch()


def measure(table: Table, workdir: epath.Path, children: "Children") -> None:
    """Measures all trained rows anew, so that figures of two machines or versions do not mix."""
    if not (files.seed_dir(workdir, table.reference.slug, 0) / "config.json").exists():
        row, tried = table.config.reference, table.config.learning_rates
        why = f"row {row!r}: every learning rate diverged, and others are measured by it"
        raise RunError(f"{why}; give another --workdir, other config.learning_rates than {tried!r}")
    (workdir / files.MEASURED).unlink(missing_ok=True)
    command = ["uoe_jax.compare.run", "measure", str(workdir)]
    children.run(command, "measuring the rows side by side")


class Children:
    """Child processes, one after the other; while entered, it passes signals on to them."""

    def __init__(self) -> None:
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str], what: str) -> int:
        """Runs `python -m command`; returns its exit code, 0 or that of bad numbers."""
        if self.stopped:
            raise Ended(errors.EXIT_STOPPED)
        print(f"== {what}", file=sys.stderr, flush=True)
        # In a process group of its own, so that Ctrl-C reaches it once, from here.
        self._child = subprocess.Popen(
            [sys.executable, "-m", *command],
            start_new_session=True,
            preexec_fn=_end_with_parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        if self.stopped:  # while it was started
            self._child.send_signal(signal.SIGTERM)
        code = self._child.wait()
        self._child = None
        if code == errors.EXIT_STOPPED or self.stopped and code:
            raise Ended(errors.EXIT_STOPPED)
        if code == errors.EXIT_BAD_INPUT:
            raise Ended(code)
        if code not in (errors.EXIT_DONE, errors.EXIT_BAD_NUMBERS):
            raise RunError(f"{what}: ended with exit code {code} (above); {errors.AGAIN}")
        return code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.send_signal(number)

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._old = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._child is not None:
            self._child.kill()


def _end_with_parent() -> None:
    """In a child before its program starts: SIGTERM when this process is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def main(job: str, given: str) -> int:
    """The program of the two other processes; returns the exit code."""
    runtime_env.prepare_process()
    try:
        with runtime_env.jax_import_errors():
            if job == "check":
                from uoe_jax.distributed import setup
                from uoe_jax.train.main import agreed_data

                config = from_dict(json.loads(given))
                setup.start(config)
                agreed_data(config, None)
            else:
                from uoe_jax.compare import measure

                measure.measure(given)
    except UserError as error:
        runtime_env.notice(str(error))
        return error.exit_code
    return errors.EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
