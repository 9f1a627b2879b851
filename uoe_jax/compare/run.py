"""`uoe compare`: trains every row of a table with every seed, measures them side by side, writes the table.

Every run is an ordinary `uoe train` in a process of its own, in `<workdir>/rows/<row>/seed_<n>`: it resumes where it was
stopped, and can be looked at, evaluated or exported like any other. A run that is finished is not started again.

    1. of every row, where learning rates are given: a short run with each; the best on validation is kept (`rates.json`);
    2. of every row and seed: the run;
    3. in one process, interleaved: time, memory and operations of a step of every row, and over context lengths (`measured.json`);
    4. `table.md`, `table.csv` and the plots.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any, Iterator, NamedTuple, Sequence

from etils import epath

from uoe_jax.compare.table import Row, Table
from uoe_jax.config.schema import Config, changed_keys, from_dict, to_dict
from uoe_jax.distributed import coordination
from uoe_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_BAD_NUMBERS,
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    RunError,
    UserError,
)
from uoe_jax.runtime_env import default_cache_dir, print_result
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import (
    locate,
    lock,
    os_errors,
    read_json,
    release,
    wait_for_writer,
    write_json,
    write_text,
)

ORPHAN_S = 120  # that a run whose table was killed may take to end its step and save
RATES, TABLE = "rates.json", "table.json"
DAMAGED = "remove it and what it is about, or give another --workdir"
FIXED = (
    "match",
    "reference",
    "learning_rates",
    "search_steps",
)  # of TableConfig: what finished rows depend on
# Of a run that goes on these may change (train.steps where optimizer.decay_steps is set). In a table they settle what is
# measured, of which checkpoint, and after how many steps.
MEASURES = ("eval.test", "eval.every", "checkpoint.every", "checkpoint.keep_best", "train.steps")


class Planned(NamedTuple):
    """One run. what: in words."""

    row: Row
    config: Config
    workdir: epath.Path
    what: str


def compare(table: Table, workdir_name: str) -> int:
    """Does what is left of a table; returns 0, 75 where it was asked to stop (the same command goes on), or 2 where a run found
    its input bad.

    Raises:
      UserError: the workdir holds another table, or one process of several asks. RunError: a run failed.
    """
    if coordination.are_several():
        remedy = "a table is made by one process on all devices of one machine; start this once, and not by srun or its like"
        raise UserError(f"--workdir={workdir_name}: {remedy}")
    workdir = locate(workdir_name)
    try:
        with os_errors(workdir_name):
            is_new = not (workdir / TABLE).exists()
        default_cache_dir()  # runs find it in their environment, where it is not the usual one
        if is_new:  # what no run could start with is refused before anything is made
            with Children() as children:
                config = json.dumps(to_dict(table.reference.config))
                children.run(["uoe_jax.compare.check", config], "looking at devices and data")
        with os_errors(workdir_name):
            workdir.mkdir(parents=True, exist_ok=True)
            lock(workdir_name, workdir)
            claim(table, workdir)
    except Stopped:
        return EXIT_STOPPED
    except Refused:
        return EXIT_BAD_INPUT
    except OSError as error:
        raise UserError(
            f"--workdir={workdir_name}: cannot be written ({error.strerror or error}); give a directory you may write to"
        ) from error
    try:
        with Children() as children:
            rates = found_rates(table, workdir, children)
            for planned in runs(table, workdir, rates):
                train(planned, children)
            measure(table, workdir, children)
    except Stopped:
        return EXIT_STOPPED
    except Refused:
        return EXIT_BAD_INPUT
    finally:
        release(workdir)
    from uoe_jax.compare.report import write

    print_result(write(table, workdir))
    return EXIT_DONE


class Stopped(Exception):
    """Asked to stop, here or by a child that was."""


class Refused(Exception):
    """A child was refused its input, and has said so."""


def claim(table: Table, workdir: epath.Path) -> None:
    """Writes what the table is into its directory, or makes sure that it is what is there; seeds and rows may be added."""
    path, own = workdir / TABLE, dataclasses.asdict(table.config)
    rows: dict[str, dict[str, Any]] = {
        row.slug: {
            "name": row.name,
            "preset": row.preset,
            "miss": row.miss,
            "config": to_dict(row.config),
        }
        for row in table.rows
    }
    known = read_json(path, DAMAGED) or {**own, "rows": {}}
    stored = known.get("rows")
    if not (
        known.keys() >= {*FIXED}
        and isinstance(stored, dict)
        and all(isinstance(r, dict) and isinstance(r.get("config"), dict) for r in stored.values())
    ):
        raise UserError(f"{path}: is no table of uoe compare; {DAMAGED}")
    for key in FIXED:
        if known[key] != own[key]:
            raise ConfigError(
                f"config.{key}",
                own[key],
                f"the table in this workdir has {known[key]!r}; give that, or another --workdir",
            )
    for slug, row in rows.items():
        changed = changed_keys(
            from_dict(known["rows"].get(slug, row)["config"]), from_dict(row["config"]), MEASURES
        )
        if changed:
            key, old, new = changed[0]
            remedy = f"the row {row['name']!r} of the table in this workdir has {old!r}, from its config or preset of then; give that, or another --workdir"
            raise ConfigError(f"config.base.{key}", new, remedy)
    # Rows that were left out this time (--config.rows) stay, and are in the table if they are finished.
    write_json(path, {**own, "rows": known["rows"] | rows})


def runs(table: Table, workdir: epath.Path, rates: dict[str, float | None]) -> Iterator[Planned]:
    """Seed by seed, so that a table that is stopped early holds all rows. A row that no learning rate suits has none."""
    for seed in range(table.config.seeds):
        for row in table.rows:
            if rates.get(row.slug, 0.0) is not None:
                config = _with(row.config, rates.get(row.slug), seed=seed)
                yield Planned(
                    row,
                    config,
                    workdir / "rows" / row.slug / f"seed_{seed}",
                    f"{row.name}, seed {seed}",
                )


def found_rates(table: Table, workdir: epath.Path, children: Children) -> dict[str, float | None]:
    """The learning rate of every row that is best on validation after a short run, the same tries for all; None: all diverged.

    Raises:
      Stopped: before every try of every row is done: no row is trained on half a search.
    """
    known = searched_losses(workdir)
    for row in table.rows:
        tried = known.setdefault(row.slug, {})
        for rate in table.rates:
            if str(rate) not in tried:
                config = _with(row.config, rate, steps=table.search_steps)
                place = workdir / "rows" / row.slug / f"rate_{rate:g}"
                train(Planned(row, config, place, f"{row.name}, learning rate {rate:g}"), children)
                losses = (
                    []
                    if diverged(place)
                    else [line["eval/loss"] for line in read_metrics(place) if "eval/loss" in line]
                )
                tried[str(rate)] = (
                    losses[-1] if losses and math.isfinite(losses[-1]) else None
                )  # None: its numbers went bad
                write_json(workdir / RATES, known)
    return best_rates(known)


def searched_losses(workdir: epath.Path) -> dict[str, dict[str, float | None]]:
    """By row and learning rate, as far as they are known."""
    path = workdir / RATES
    try:
        known = read_json(path, DAMAGED) or {}
        return {
            slug: {
                str(float(rate)): None if loss is None else float(loss)
                for rate, loss in tried.items()
            }
            for slug, tried in known.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: holds other things than losses by row and learning rate; {DAMAGED}"
        ) from error


def best_rates(tried: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """Of the losses by row and rate, the best rate of every row; None where none has a loss."""
    out: dict[str, float | None] = {}
    for slug, losses in tried.items():
        found = {rate: loss for rate, loss in losses.items() if loss is not None}
        if losses:
            out[slug] = float(min(found, key=lambda rate: found[rate])) if found else None
    return out


def _with(config: Config, rate: float | None, seed: int = 0, steps: int = 0) -> Config:
    """The same with a learning rate, a seed, and so many steps; a shorter run is not tested."""
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=rate or config.optimizer.learning_rate
    )
    train = dataclasses.replace(
        config.train, seed=seed, steps=steps or config.train.steps, report=False
    )
    found = dataclasses.replace(config, optimizer=optimizer, train=train)
    if not steps:
        return found
    optimizer = dataclasses.replace(
        optimizer, warmup_steps=min(optimizer.warmup_steps, max(1, steps // 10))
    )
    return dataclasses.replace(
        found, optimizer=optimizer, eval=dataclasses.replace(config.eval, test=False)
    )


def train(planned: Planned, children: Children) -> None:
    """Trains what is left of a run. One whose numbers went bad is over.

    Raises:
      Stopped: it was asked to stop. RunError: it failed.
    """
    if is_finished(planned.config, planned.workdir) or diverged(planned.workdir):
        return
    wait_for_writer(planned.workdir, ORPHAN_S, lambda: children.stopped)
    planned.workdir.parent.mkdir(parents=True, exist_ok=True)
    file = planned.workdir.parent / f"{planned.workdir.name}.json"
    write_json(file, to_dict(planned.config))
    command = ["uoe_jax", "train", f"--config={file}", f"--workdir={planned.workdir}"]
    if children.run(command, planned.what, accepted=(EXIT_BAD_NUMBERS,)) == EXIT_BAD_NUMBERS:
        write_text(planned.workdir / "diverged", "bad numbers\n")


def measure(table: Table, workdir: epath.Path, children: Children) -> None:
    """Measures all rows that were trained, anew: figures of another machine or version are not mixed with these.

    Raises:
      Stopped: it was asked to stop. RunError: it failed, or nothing was trained of the row that others are measured by.
    """
    if not (workdir / "rows" / table.reference.slug / "seed_0" / "config.json").exists():
        remedy = f"others are measured by it; give another --workdir and config.learning_rates than {table.config.learning_rates!r}"
        raise RunError(
            f"row {table.config.reference!r}: every learning rate diverged, and {remedy}"
        )
    (workdir / "measured.json").unlink(missing_ok=True)
    children.run(["uoe_jax.compare.measure", str(workdir)], "measuring the rows side by side")


def is_finished(config: Config, workdir: epath.Path) -> bool:
    """Whether a run has measured all it is to measure."""
    if not (workdir / "metrics.jsonl").exists():
        return False
    lines = read_metrics(workdir)
    evaluated = any(line["step"] == config.train.steps and "eval/loss" in line for line in lines)
    return evaluated and (not config.eval.test or any("test/loss" in line for line in lines))


def diverged(workdir: epath.Path) -> bool:
    """Whether a run was given up because its numbers went bad."""
    return (workdir / "diverged").exists()


class Children:
    """Processes one after the other. While entered, a wish to stop (SIGTERM, SIGINT, SIGUSR1) is handed to the running one."""

    def __init__(self) -> None:
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None
        self._old: dict[int, Any] = {}

    def run(self, command: Sequence[str], what: str, accepted: Sequence[int] = ()) -> int:
        """Runs a module of Python with arguments; its exit code, 0 or one that is accepted.

        Raises:
          Stopped: it was asked to stop, or this process was. Refused: by its input. RunError: another exit code.
        """
        if self.stopped:
            raise Stopped
        print(f"== {what}", file=sys.stderr, flush=True)
        # In a group of its own: a Ctrl-C then reaches it once, from here.
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", *command]
        self._child = subprocess.Popen(
            command, start_new_session=True, preexec_fn=_end_with_parent, env=env
        )
        if self.stopped:  # while it was started
            self._child.send_signal(signal.SIGTERM)
        code = self._child.wait()
        self._child = None
        if code == EXIT_STOPPED or self.stopped and code:
            raise Stopped
        if code == EXIT_BAD_INPUT:
            raise Refused
        if code != EXIT_DONE and code not in accepted:
            raise RunError(
                f"{what}: ended with exit code {code} (above); fix that and run the same command again"
            )
        return code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._child is not None:
            self._child.send_signal(number)

    def __enter__(self) -> Children:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._child is not None:
            self._child.kill()


def _end_with_parent() -> None:
    """In a child, before its program starts: SIGTERM when this process is killed, so that no run goes on unwatched (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
