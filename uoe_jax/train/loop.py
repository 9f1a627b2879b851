"""The loop of `uoe train`: train, evaluate, save, stop, go back. `main` has the order of a run."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
from uoe_jax.distributed.setup import describe_devices, host_peak_bytes
from uoe_jax.errors import EXIT_DONE, EXIT_STOPPED, BadNumbers, RunError
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.evaluate import Interrupted, evaluate, is_new
from uoe_jax.train.measures import measures
from uoe_jax.train.metadata import CheckpointDamaged
from uoe_jax.train.metrics import MetricsWriter, NullWriter, read_metrics
from uoe_jax.train.progress import Progress
from uoe_jax.train.saved import load_params
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import Program, TrainState
from uoe_jax.train.summary import measures_text, without_prefix
from uoe_jax.train.task import task_of


class TooManyBadSteps(Exception):
    """`in_a_row` bad steps up to `step`, as many as are allowed."""

    def __init__(self, step: int, in_a_row: int) -> None:
        self.step, self.in_a_row = step, in_a_row


class Run:
    """The host's state of a running `uoe train`; `go` is the loop.

    Args:
      open_writer: (step, owed) -> the writer of metrics, which cuts off what was logged after
        `step`, and its evaluation where that is `owed`.
      start: the step of `state`.
      owed: the evaluation of `start` was interrupted before, and is still to be done.

    Attributes:
      step: of the current state.
      pending: (step, its measures, still on the device).
      in_a_row: bad steps up to the last one that was read.
      ranking_loss: of the current state, where it was evaluated.
      seen: shapes of batches for which something was compiled in this process.
    """

    def __init__(
        self,
        config: Config,
        data: DataBundle,
        program: Program,
        store: CheckpointStore,
        open_writer: Callable[..., MetricsWriter | NullWriter],
        progress: Progress,
        state: TrainState,
        start: int,
        owed: bool = False,
    ) -> None:
        self.config, self.data, self.program, self.state = config, data, program, state
        self.store, self.progress, self.open_writer = store, progress, open_writer
        self.writer, self.owed = open_writer(start, owed), owed
        self.start, self.step = start, start
        self.stop = min(config.train.stop_after or config.train.steps, config.train.steps)
        self.pending: tuple[int, Any] | None = None
        self.in_a_row = int(jax.device_get(state.guard.in_a_row))
        self.ranking_loss: float | None = None
        self.seen: set[Any] = set()
        self.clock = Clock()

    def go(self, signal: StopSignal) -> int:
        """Runs until done (0) or asked to stop (75)."""
        with jax.transfer_guard("disallow"):
            while True:
                try:
                    return self.train(signal)
                except Interrupted:
                    return self.stop_early(owed=True)
                except TooManyBadSteps as bad:
                    self.roll_back(bad)

    def train(self, signal: StopSignal) -> int:
        """The loop itself; Interrupted in an evaluation, TooManyBadSteps to be rolled back."""
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
            assert self.ranking_loss is not None
            self.store.rank(self.step, self.ranking_loss)
        with Prefetcher(fetch, self.start, self.stop) as prefetcher:
            while self.step < self.stop:
                if self.step > self.start:  # what is due at `start` was done before
                    if _due(self.step, c.eval.every):
                        self.evaluate(signal)
                    if _due(self.step, c.checkpoint.every):
                        self.save()
                self.store.check()
                if signal.should_stop():
                    return self.stop_early()
                watchdog.at("training", self.step, slow=self.step == self.start)
                self.dispatch(prefetcher.get(self.step))
            if self.step > self.start:
                if self.step == c.train.steps or _due(self.step, c.eval.every):
                    self.evaluate(signal)
                self.save(always=True)
            self.store.wait()
            if c.eval.test and self.step == c.train.steps and not self.is_tested():
                self.test(signal)
        return EXIT_DONE

    def dispatch(self, batch: Any) -> None:
        """Starts a step, and reads the one before: the host is one step ahead of the devices."""
        compiling: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if is_new(("train", batch), self.seen):
            compiling = self.progress.compiling("the train step")
            if self.step > self.start:
                watchdog.at("training", self.step, slow=True)
        with compiling:
            self.state, on_device = self.program.train_step(self.state, batch)
        self.step += 1
        self.ranking_loss = None
        self.log_pending()
        self.pending = (self.step, on_device)

    def stop_early(self, owed: bool = False) -> int:
        """Saves and waits for the commit; owed: this step is still to be evaluated."""
        self.store.wait()  # it may be of this very step
        self.save(owed, always=True)
        self.store.wait()
        return EXIT_STOPPED

    def evaluate(self, signal: StopSignal) -> None:
        """Measures the current state on the validation split."""
        self.log_pending()
        limit, last = self.config.eval.batches, self.step == self.config.train.steps
        with self.clock.paused():
            found, self.ranking_loss = evaluate(
                self.program,
                self.state.params,
                self.data.validation,
                self.config,
                limit,
                whole=last or not limit,
                step=self.step,
                seen=self.seen,
                stop=signal.should_stop,
                progress=self.progress,
            )
            self.writer.write(self.step, found)
        text = measures_text(found, "eval", self.config)
        self.progress.print(f"step {self.step}: validation {text}")

    def test(self, signal: StopSignal) -> None:
        """Measures the test split, once in a run, with the checkpoint best on validation."""
        best = self.store.best_step()
        best = self.step if best is None else best
        params = self.state.params
        if best != self.step:
            watchdog.at("restoring", best, slow=True)
            try:
                path = self.store.directory / str(best)
                params = load_params(path, self.program.abstract.params)[0]
            except CheckpointDamaged as error:
                raise RunError(
                    f"{error}; it is the best on validation: delete it, and the same command tests "
                    "with the next best, or give --config.eval.test=false"
                ) from error
        found, _ = evaluate(
            self.program,
            params,
            self.data.test,
            self.config,
            step=self.step,
            seen=self.seen,
            stop=signal.should_stop,
            name="test",
            progress=self.progress,
        )
        self.writer.write(self.step, {**found, "test/step": best})
        self.writer.flush()
        text = measures_text(found, "test", self.config)
        self.progress.print(f"test, with the checkpoint of step {best}: {text}")

    def is_tested(self) -> bool:
        """Whether this run has measured the test split."""
        workdir = self.store.directory.parent
        return on_process_zero(lambda: any("test/loss" in line for line in read_metrics(workdir)))

    def save(self, owed: bool = False, always: bool = False) -> None:
        """Starts to save the current state, after flushing the metrics up to it.

        always: also within bad steps, whose state is that from before them.
        """
        self.log_pending()
        if self.step in self.store.steps() or (self.in_a_row and not always):
            return
        self.store.pinned = self.newest(self.step - self.in_a_row) if self.in_a_row else None
        watchdog.at("saving", self.step, slow=True)
        with self.clock.paused():
            self.writer.flush()
            metrics = None if self.ranking_loss is None else {"loss": self.ranking_loss}
            mesh = {
                "axes": dict(self.program.mesh.shape),
                "processes": jax.process_count(),
                "devices": describe_devices(),
            }
            metadata = {
                "config": to_dict(self.config),
                "data": self.data.record,
                "mesh": mesh,
                "evaluation_owed": owed,
            }
            with jax.transfer_guard("allow"):  # Orbax copies to the host as it sees fit
                self.store.save(self.step, self.state, metrics, metadata)

    def log_pending(self) -> None:
        """Reads and logs the step dispatched before; TooManyBadSteps if it was one too many."""
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
            raise TooManyBadSteps(step, self.in_a_row)

    def log(self, step: int, host: dict[str, Any], due: bool) -> None:
        """Shows the measures of a step, and writes them to metrics.jsonl where that is `due`."""
        found = measures(host["sums"], self.config, "train")
        found["train/grad_norm"] = float(host["grad_norm"])
        found["train/learning_rate"] = float(host["learning_rate"])
        found["train/tokens"] = int(host["sums"].tokens)
        found["train/skipped"] = int(host["guard"].skipped)
        found["train/rollbacks"] = int(host["guard"].rollbacks)
        found |= speed_measures(self.clock.read(step), self.config) | peak_bytes()
        if due:
            self.writer.write(step, found)
        if self.in_a_row:
            text = f"loss {found['train/loss']:.4g}, gradient norm {found['train/grad_norm']:.4g}"
            count = f"{self.in_a_row} in a row, {found['train/skipped']} in all"
            self.progress.print(f"step {step} skipped: {text} ({count})")
        text = task_of(self.config).summary(without_prefix(found, "train"))
        self.progress.update(step, found["train/loss"], text, found.get("perf/tokens_per_second"))

    def newest(self, step: int) -> int | None:
        """The newest checkpoint of `step` or earlier."""
        return max((s for s in self.store.steps() if s <= step), default=None)

    def roll_back(self, bad: TooManyBadSteps) -> None:
        """Goes back to the newest checkpoint before the bad steps; the batches since are skipped.

        BadNumbers where no rollback is left (guard.rollbacks), or no such checkpoint.
        """
        self.store.wait()
        target = self.newest(bad.step - bad.in_a_row)
        c, done = self.config.guard, int(jax.device_get(self.state.guard.rollbacks))
        if done >= c.rollbacks or target is None:
            found = f"the checkpoint of step {target} is"
            found = "there is no checkpoint" if target is None else found
            raise BadNumbers(
                f"config.guard.max_bad_steps={c.max_bad_steps}: {bad.in_a_row} steps in a row, up "
                f"to step {bad.step}, had numbers that are not finite or jumped, and were skipped; "
                "lower optimizer.learning_rate in a new --workdir, or look at the data of these "
                f"steps ({found} from before them)"
            )
        watchdog.at("going back", bad.step, slow=True)
        position = bad.step + int(jax.device_get(self.state.guard.offset))
        state = self.store.restore(target, self.program.abstract)
        self.store.delete_after(target)  # saved by a stop within the bad steps: the same state
        guard = state.guard
        offset, rollbacks = jax.device_put(
            (np.int32(position - target), np.int32(done + 1)),
            (guard.offset.sharding, guard.rollbacks.sharding),
        )
        self.state = state._replace(guard=guard._replace(offset=offset, rollbacks=rollbacks))
        self.step = self.start = target
        self.in_a_row, self.pending, self.ranking_loss = 0, None, None
        self.writer.close()
        self.writer = self.open_writer(target)
        done_text = f"back to step {target}, leaving out the data of the steps up to {bad.step}"
        self.progress.print(f"{bad.in_a_row} bad steps in a row: {done_text}")


def peak_bytes() -> dict[str, Any]:
    """Peak memory of this process: of its first device ("n/a" on CPUs), and of the host."""
    device = jax.local_devices()[0].memory_stats() or {}
    return {
        "perf/device_peak_bytes": device.get("peak_bytes_in_use", "n/a"),
        "perf/host_peak_bytes": host_peak_bytes(),
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Speed(NamedTuple):
    """Means over the steps between two readings."""

    seconds_per_step: float
    tokens_per_second: float


def speed_measures(speed: Speed | None, config: Config) -> dict[str, Any]:
    """Measures `perf/…` of a speed; FLOPs are "n/a" where steps have several lengths."""
    if speed is None:
        return {}
    flops = train_flops(config.model, config.train.batch_size) / speed.seconds_per_step
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    one_length = config.data.buckets <= 1
    return {
        "perf/seconds_per_step": speed.seconds_per_step,
        "perf/tokens_per_second": speed.tokens_per_second,
        "perf/model_flops_per_second": flops if one_length else "n/a",
        "perf/mfu": flops / peak / jax.device_count() if peak and one_length else "n/a",
    }


class Clock:
    """The speed of steps between two readings, evaluations and saves left out."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._pause, self._tokens = 0.0, 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - since

    def count(self, tokens: int) -> None:
        """Counts the tokens of a step, before a reading at it."""
        self._tokens += tokens

    def read(self, step: int) -> Speed | None:
        """Since the last reading; None at the first, which waited for the compiler."""
        now, last = time.perf_counter(), self._last
        self._last = (step, now)
        (pause, self._pause), (tokens, self._tokens) = (self._pause, 0.0), (self._tokens, 0)
        if last is None or step <= last[0]:
            return None
        seconds = max(now - last[1] - pause, 1e-9)
        return Speed(seconds / (step - last[0]), tokens / seconds)
