"""The loop of `uoe train`, from the first step of a sitting to its end."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import Any, Callable, Iterator, NamedTuple

import jax
import numpy as np

from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import Config
from uoe_jax.costs.flops import PEAK_FLOPS, train_flops
from uoe_jax.data.pipeline import DataBundle, TrainBatches
from uoe_jax.data.prefetch import Prefetcher
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import watchdog
from uoe_jax.distributed.coordination import on_process_zero
from uoe_jax.distributed.setup import cost_of_determinism, describe_devices, host_peak_bytes
from uoe_jax.errors import EXIT_DONE, EXIT_STOPPED, BadNumbers, RunError
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.evaluate import Interrupted, evaluate, is_new
from uoe_jax.train.measures import measures
from uoe_jax.train.metrics import MetricsWriter, Progress, Silent, read_metrics
from uoe_jax.train.saved import CheckpointDamaged, load_params
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import Program, TrainState
from uoe_jax.train.task import task_of


class BadStretch(Exception):
    """`in_a_row` bad steps up to `step`, as many as are allowed."""

    def __init__(self, step: int, in_a_row: int) -> None:
        self.step, self.in_a_row = step, in_a_row


class Run:
    """The state of a running `uoe train` on the host; `go` is the loop."""

    def __init__(
        self,
        config: Config,
        data: DataBundle,
        program: Program,
        store: CheckpointStore,
        open_writer: Callable[..., MetricsWriter | Silent],
        progress: Progress | Silent,
        state: TrainState,
        start: int,
        owed: bool = False,
    ) -> None:
        """open_writer: makes the writer of metrics that cuts off what was logged after a step (and the evaluation of that
        step, where it is `owed`: was interrupted before)."""
        self.config, self.data, self.program, self.state = config, data, program, state
        self.store, self.progress, self.open_writer = store, progress, open_writer
        self.writer, self.owed = open_writer(start, owed), owed
        self.start, self.step = start, start
        self.stop = min(config.train.stop_after or config.train.steps, config.train.steps)
        self.pending: tuple[int, Any] | None = None  # (step, measures still on the device)
        self.in_a_row = int(
            jax.device_get(state.guard.in_a_row)
        )  # bad steps up to the last one looked at
        self.ranking_loss: float | None = None  # of the state at self.step, where it was evaluated
        self.seen: set[Any] = (
            set()
        )  # shapes of batches for which something was compiled in this process
        self.clock = Clock()

    def go(self, signal: StopSignal) -> int:
        """Runs until done (0) or asked to stop (75)."""
        with jax.transfer_guard("disallow"):
            while True:
                try:
                    return self.train(signal)
                except Interrupted:
                    return self.stop_early(owed=True)
                except BadStretch as bad:
                    self.roll_back(bad)

    def train(self, signal: StopSignal) -> int:
        """The loop itself.

        Raises:
          Interrupted: asked to stop in an evaluation.
          BadStretch: too many bad steps in a row.
        """
        c, program = self.config, self.program
        rows = mesh_lib.local_rows(program.devices, c.train.batch_size)
        batches = TrainBatches(
            self.data.train, c.train.batch_size, c.train.seed, rows, c.data.sort_window
        )
        offset = int(jax.device_get(self.state.guard.offset))
        fetch = lambda step: mesh_lib.put_batch(program.devices, batches[step + offset])  # noqa: E731
        if self.owed:
            self.evaluate(signal)
            self.owed = False
            assert self.ranking_loss is not None  # of the evaluation
            self.store.rank(self.step, self.ranking_loss)
        with Prefetcher(fetch, self.start, self.stop) as prefetcher:
            while self.step < self.stop:
                if self.step > self.start:  # what is due at the first step was done before the stop
                    if _due(self.step, c.eval.every):
                        self.evaluate(signal)
                    if _due(self.step, c.checkpoint.every):
                        self.save()
                self.store.check()
                if signal.due():
                    return self.stop_early()
                watchdog.at("training", self.step, slow=self.step == self.start)
                batch = prefetcher.get(self.step)
                if is_new(("train", batch), self.seen) and self.step > self.start:
                    watchdog.at("training", self.step, slow=True)
                self.state, on_device = program.train_step(self.state, batch)
                self.step += 1
                self.ranking_loss = None
                self.log_pending()
                self.pending = (self.step, on_device)
            if self.step > self.start:
                if self.step == c.train.steps or _due(self.step, c.eval.every):
                    self.evaluate(signal)
                self.save(always=True)
            self.store.wait()
            if c.eval.test and self.step == c.train.steps and not self.is_tested():
                self.test(signal)
        return EXIT_DONE

    def stop_early(self, owed: bool = False) -> int:
        """Saves, waits until that is committed, and gives the exit code; owed: this step is still to be evaluated."""
        self.store.wait()  # it may be of this very step
        self.save(owed, always=True)
        self.store.wait()
        return EXIT_STOPPED

    def evaluate(self, signal: StopSignal) -> None:
        """Measures the current state on the validation split."""
        self.log_pending()
        with self.clock.paused():
            limit, last = self.config.eval.batches, self.step == self.config.train.steps
            found, self.ranking_loss = evaluate(
                self.program,
                self.state.params,
                self.data.validation,
                self.config,
                limit,
                whole=last or not limit,
                step=self.step,
                seen=self.seen,
                stop=signal.due,
            )
            self.writer.write(self.step, found)
        self.progress.say(f"step {self.step}: validation {self.said(found, 'eval')}")

    def test(self, signal: StopSignal) -> None:
        """Measures the test split, once in the life of a run, with the checkpoint that is best on validation."""
        best = self.store.best_step()
        best = self.step if best is None else best
        params = self.state.params
        if best != self.step:
            watchdog.at("restoring", best, slow=True)
            try:
                params = load_params(
                    self.store.directory / str(best), self.program.abstract.params
                )[0]
            except CheckpointDamaged as error:
                raise RunError(
                    f"{error}; it is the best on validation: delete it, and the same command tests with the next best, or give "
                    "--config.eval.test=false"
                ) from error
        found, _ = evaluate(
            self.program,
            params,
            self.data.test,
            self.config,
            step=self.step,
            seen=self.seen,
            stop=signal.due,
            name="test",
        )
        self.writer.write(self.step, {**found, "test/step": best})
        self.writer.flush()
        self.progress.say(f"test, with the checkpoint of step {best}: {self.said(found, 'test')}")

    def is_tested(self) -> bool:
        """Whether this run has measured the test split."""
        workdir = self.store.directory.parent
        return on_process_zero(lambda: any("test/loss" in line for line in read_metrics(workdir)))

    def said(self, found: dict[str, Any], prefix: str) -> str:
        """An evaluation in words."""
        own = _own(found, prefix)
        return f"loss {own['loss']:.4f}, {task_of(self.config).said(own)} ({own['rows']} rows)"

    def save(self, owed: bool = False, always: bool = False) -> None:
        """Starts to save the current state; every line of metrics up to it is on the disk first.

        always: within a stretch of bad steps as well, whose state is that from before it.
        """
        self.log_pending()
        if self.step in self.store.steps() or (self.in_a_row and not always):
            return
        self.store.hold = self.before(self.step - self.in_a_row) if self.in_a_row else None
        watchdog.at("saving", self.step, slow=True)
        with self.clock.paused():
            self.writer.flush()
            metrics = None if self.ranking_loss is None else {"loss": self.ranking_loss}
            mesh = {
                "axes": dict(self.program.mesh.shape),
                "processes": jax.process_count(),
                "devices": describe_devices(),
            }
            kept = {
                "config": to_dict(self.config),
                "data": self.data.record,
                "mesh": mesh,
                "evaluation_owed": owed,
            }
            with jax.transfer_guard("allow"):  # Orbax copies to the host as it sees fit
                self.store.save(self.step, self.state, metrics, kept)

    def log_pending(self) -> None:
        """Looks at the step dispatched before this one, and logs it; so the host is one step ahead of the devices.

        Raises:
          BadStretch: it was bad, and so were those before it.
        """
        if self.pending is None:
            return
        (step, on_device), self.pending = self.pending, None
        in_a_row, tokens = jax.device_get((on_device["guard"].in_a_row, on_device["sums"].tokens))
        self.in_a_row = int(in_a_row)
        self.clock.count(int(tokens))
        last, c = step == self.config.train.steps, self.config
        due = step % c.train.log_every == 0 or last or self.in_a_row > 0
        if due or step == self.start + 1:
            self.log(step, jax.device_get(on_device), due)
        if self.in_a_row >= c.guard.max_bad_steps:
            raise BadStretch(step, self.in_a_row)

    def log(self, step: int, host: dict[str, Any], due: bool) -> None:
        """Writes and shows the measures of a step; due: they belong into metrics.jsonl."""
        found = measures(host["sums"], self.config, "train")
        found["train/grad_norm"] = float(host["grad_norm"])
        found["train/learning_rate"] = float(host["learning_rate"])
        found["train/tokens"] = int(host["sums"].tokens)
        found["train/skipped"] = int(host["guard"].skipped)
        found["train/rollbacks"] = int(host["guard"].rollbacks)
        speed = self.clock.read(step)
        if speed is not None:
            seconds = speed.seconds_per_step
            flops = train_flops(self.config.model, self.config.train.batch_size) / seconds
            peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
            alike = self.config.data.buckets <= 1  # else steps are of several lengths
            found["perf/seconds_per_step"] = seconds
            found["perf/tokens_per_second"] = speed.tokens_per_second
            found["perf/model_flops_per_second"] = flops if alike else "n/a"
            found["perf/mfu"] = flops / peak / jax.device_count() if peak and alike else "n/a"
        found |= peak_bytes()
        if due:
            self.writer.write(step, found)
        if self.in_a_row:
            text = f"loss {found['train/loss']:.4g}, gradient norm {found['train/grad_norm']:.4g}"
            self.progress.say(
                f"step {step} skipped: {text} ({self.in_a_row} in a row, {found['train/skipped']} in all)"
            )
        told = task_of(self.config).said(_own(found, "train"))
        self.progress.update(step, found["train/loss"], told, found.get("perf/tokens_per_second"))

    def before(self, step: int) -> int | None:
        """The newest checkpoint of `step` or earlier."""
        return max((s for s in self.store.steps() if s <= step), default=None)

    def roll_back(self, bad: BadStretch) -> None:
        """Goes back to the newest checkpoint from before a stretch of bad steps; the batches since then are left out.

        Raises:
          BadNumbers: no rollback is left (guard.rollbacks), or no such checkpoint.
        """
        self.store.wait()
        target = self.before(bad.step - bad.in_a_row)
        limit, done = self.config.guard.rollbacks, int(jax.device_get(self.state.guard.rollbacks))
        if done >= limit or target is None:
            which = (
                "there is no checkpoint"
                if target is None
                else f"the checkpoint of step {target} is"
            )
            raise BadNumbers(
                f"config.guard.max_bad_steps={self.config.guard.max_bad_steps}: {bad.in_a_row} steps in a row, up to step "
                f"{bad.step}, had numbers that are not finite or jumped, and were skipped; lower optimizer.learning_rate in a "
                f"new --workdir, or look at the data of these steps ({which} from before them)"
            )
        watchdog.at("going back", bad.step, slow=True)
        taken = bad.step + int(jax.device_get(self.state.guard.offset))
        state = self.store.restore(target, self.program.abstract)
        self.store.drop_after(
            target
        )  # saved by a stop within the stretch: the same state, and no place to go on from
        guard = state.guard
        told = (np.int32(taken - target), np.int32(done + 1))
        offset, rollbacks = jax.device_put(told, (guard.offset.sharding, guard.rollbacks.sharding))
        self.state = state._replace(guard=guard._replace(offset=offset, rollbacks=rollbacks))
        self.step = self.start = target
        self.in_a_row, self.pending, self.ranking_loss = 0, None, None
        self.writer.close()
        self.writer = self.open_writer(target)
        self.progress.say(
            f"{bad.in_a_row} bad steps in a row: back to step {target}, leaving out the data of the steps up to {bad.step}"
        )

    def welcome(self, workdir: str) -> str:
        c, n = self.config, sum(x.size for x in jax.tree.leaves(self.program.abstract.params))
        where = f"resuming at step {self.start}" if self.start else "starting"
        if self.start >= c.train.steps:
            where = f"nothing left to train, {self.start} of {c.train.steps} steps are done,"
        return (
            f"{where} in {workdir}: {c.model.attention} + {c.model.mlp}, {c.model.n_layers} layers, D={c.model.d_model}, "
            f"{n / 1e6:.2f}M parameters, {c.train.steps} steps of {c.train.batch_size} x {c.model.context_length} tokens "
            f"on {describe_devices()}{f'; deterministic: {cost_of_determinism()}' if c.train.deterministic else ''}\n"
            f"data: {c.data.source}, {self.data.described()}"
        )

    def farewell(self, workdir: str, exit_code: int, sample: str, report: str = "") -> str:
        if exit_code == EXIT_STOPPED:
            return f"stopped at step {self.step} with everything saved; the same command goes on from there"
        if self.step < self.config.train.steps:
            return f"step {self.step} of {self.config.train.steps} reached and saved; the same command goes on from there"
        lines = read_metrics(workdir)
        told = []
        for prefix, name in (("eval", "validation"), ("test", "test")):
            for line in [line for line in lines if f"{prefix}/loss" in line][-1:]:
                then = f" of a run of {line['step']}, and not measured again" * (
                    prefix == "test" and line["step"] != self.step
                )
                told.append(
                    f"{name} at step {line.get('test/step', line['step'])}{then}: {self.said(line, prefix)}"
                )
        if sample:
            told += ["a sample:", *("  | " + line for line in sample.splitlines())]
        told += [f"report: {report}"] * bool(report)
        here = shlex.quote(f"--workdir={workdir}")
        following = [] if self.config.eval.test else [f"  uoe eval {here} --split=test"]
        following += [
            f"  uoe generate {here} --prompt={shlex.quote(self.config.generate.prompt)}"
        ] * bool(sample)
        return "\n".join(told + ["next:", *following] * bool(following))


def peak_bytes() -> dict[str, Any]:
    """The most memory that was held so far by this process: of its first device ("n/a" on CPUs, whose memory is the host's), and of the host."""
    device = jax.local_devices()[0].memory_stats() or {}
    return {
        "perf/device_peak_bytes": device.get("peak_bytes_in_use", "n/a"),
        "perf/host_peak_bytes": host_peak_bytes(),
    }


def _own(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Measures by the names their task gives them."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in found.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Speed(NamedTuple):
    """Means over the steps between two readings."""

    seconds_per_step: float
    tokens_per_second: float


class Clock:
    """How fast steps are between two readings, evaluations and saves left out."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._pause, self._tokens = 0.0, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - since

    def count(self, tokens: int) -> None:
        """Of a step, before a reading at it."""
        self._tokens += tokens

    def read(self, step: int) -> Speed | None:
        """Since the last reading; None at the first, which only waited for the compiler."""
        now, last = time.perf_counter(), self._last
        self._last = (step, now)
        (pause, self._pause), (tokens, self._tokens) = (self._pause, 0.0), (self._tokens, 0)
        if last is None or step <= last[0]:
            return None
        seconds = max(now - last[1] - pause, 1e-9)
        return Speed(seconds / (step - last[0]), tokens / seconds)
