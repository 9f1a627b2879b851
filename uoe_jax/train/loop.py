"""The loop of `uoe train`: train, evaluate, save, stop, go back. `main` has the order of a run."""

import contextlib
import dataclasses
import time
from typing import Any, Callable, Iterator

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
from uoe_jax.train.metadata import CheckpointDamaged
from uoe_jax.train.metrics import MetricsWriter, NullWriter, read_metrics
from uoe_jax.train.progress import Progress
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import Params, Program, TrainState
from uoe_jax.train.task import measures, measures_text, task_of


class TooManyBadSteps(Exception):
    """As many bad steps in a row as are allowed; its argument is the last of them."""


@dataclasses.dataclass
class Run:
    """The host's state of a running `uoe train`; `go` is the loop."""

    config: Config
    data: DataBundle
    program: Program
    store: CheckpointStore
    open_writer: Callable[..., MetricsWriter | NullWriter]  # (step to cut its file at, owed)
    progress: Progress
    state: TrainState
    start: int  # the step of `state`
    owed: bool = False  # the evaluation of `start` was interrupted, and is still to be done

    def __post_init__(self) -> None:
        self.writer, self.clock = self.open_writer(self.start, self.owed), Clock()
        self.step, steps = self.start, self.config.train.steps
        self.stop = min(self.config.train.stop_after or steps, steps)
        self.pending: tuple[int, Any] | None = None  # step and its measures, still on the device
        self.in_a_row = int(jax.device_get(self.state.guard.in_a_row))  # bad steps last read
        self.ranking_loss: float | None = None  # of the current state, where it was evaluated
        self.seen: set[Any] = set()  # shapes of batches for which something was compiled here

    def go(self, signal: StopSignal) -> int:
        """Runs until done (0) or asked to stop (75)."""
        with jax.transfer_guard("disallow"):
            while True:
                try:
                    return self.train(signal)
                except Interrupted:
                    return self.stop_early(owed=True)
                except TooManyBadSteps as bad:
                    self.roll_back(*bad.args)

    def train(self, signal: StopSignal) -> int:
        """The loop itself; Interrupted in an evaluation, TooManyBadSteps to be rolled back."""
        c, program = self.config, self.program
        size, seed = c.train.batch_size, c.train.seed
        rows = mesh_lib.local_rows(program.mesh, size)
        batches = TrainBatches(self.data.train, size, seed, rows, c.data.sort_window)
        offset = int(jax.device_get(self.state.guard.offset))
        fetch = lambda step: mesh_lib.put_batch(program.mesh, batches[step + offset])  # noqa: E731
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
            if c.eval.test and self.step == c.train.steps:
                self.test(signal)
        return EXIT_DONE

    def dispatch(self, batch: Any) -> None:
        """Starts a step, and reads the one before: the host is one step ahead of the devices."""
        if (new := is_new("train", batch, self.seen)) and self.step > self.start:
            watchdog.at("training", self.step, slow=True)
        with self.progress.compiling("the train step", new):
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
        whole = self.step == self.config.train.steps or not self.config.eval.batches
        with self.clock.paused():
            found, self.ranking_loss = self.measure("eval", self.state.params, signal, whole)
            self.writer.write(self.step, found)
        text = measures_text(found, "eval", self.config)
        self.progress.print(f"step {self.step}: validation {text}")

    def measure(
        self, name: str, params: Params, signal: StopSignal, whole: bool
    ) -> tuple[dict[str, Any], float]:
        """`evaluate` within this run, of the validation split ("eval") or "test"."""
        rows, c = self.data.test if name == "test" else self.data.validation, self.config
        context = (self.step, self.seen, signal.should_stop, name, self.progress)
        return evaluate(self.program, params, rows, c, c.eval.batches, whole, *context)

    def test(self, signal: StopSignal) -> None:
        """Measures the test split, once in a run, with the checkpoint best on validation."""
        workdir = self.store.directory.parent
        if on_process_zero(lambda: any("test/loss" in line for line in read_metrics(workdir))):
            return
        best, params = self.store.best_step(), self.state.params
        best = self.step if best is None else best
        if best != self.step:
            watchdog.at("restoring", best, slow=True)
            abstract = {"params": self.program.abstract.params}
            try:
                params = self.store.restore(best, abstract, partial=True)["params"]
            except CheckpointDamaged as error:
                problem = f"{error}; it is the best on validation"
                remedy = "delete it, and the same command tests with the next best"
                raise RunError(f"{problem}: {remedy}, or give --config.eval.test=false") from error
        found, _ = self.measure("test", params, signal, whole=True)
        self.writer.write(self.step, {**found, "test/step": best})
        self.writer.flush()
        text = measures_text(found, "test", self.config)
        self.progress.print(f"test, with the checkpoint of step {best}: {text}")

    def save(self, owed: bool = False, always: bool = False) -> None:
        """Starts to save the state and flushes its metrics; always: also within bad steps."""
        self.log_pending()
        if self.step in self.store.steps() or (self.in_a_row and not always):
            return
        before = self.store.latest_step(self.step - self.in_a_row)
        self.store.pinned = before if self.in_a_row else None
        watchdog.at("saving", self.step, slow=True)
        with self.clock.paused():
            self.writer.flush()
            metrics = None if self.ranking_loss is None else {"loss": self.ranking_loss}
            devices = {"processes": jax.process_count(), "devices": describe_devices()}
            metadata = {
                "config": to_dict(self.config),
                "data": self.data.record,
                "mesh": {"axes": dict(self.program.mesh.shape), **devices},
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
            raise TooManyBadSteps(step)

    def log(self, step: int, host: dict[str, Any], due: bool) -> None:
        """Shows the measures of a step, and writes them to metrics.jsonl where that is `due`."""
        found = measures(host["sums"], self.config, "train")
        found["train/grad_norm"] = float(host["grad_norm"])
        found["train/learning_rate"] = float(host["learning_rate"])
        found["train/tokens"] = int(host["sums"].tokens)
        found["train/skipped"] = int(host["guard"].skipped)
        found["train/rollbacks"] = int(host["guard"].rollbacks)
        found |= perf_measures(self.clock.read(step), self.config)
        if due:
            self.writer.write(step, found)
        if self.in_a_row:
            text = f"loss {found['train/loss']:.4g}, gradient norm {found['train/grad_norm']:.4g}"
            count = f"{self.in_a_row} in a row, {found['train/skipped']} in all"
            self.progress.print(f"step {step} skipped: {text} ({count})")
        task = task_of(self.config)
        text = task.summary(task.measures(host["sums"], self.config))
        self.progress.update(step, found["train/loss"], text, found.get("perf/tokens_per_second"))

    def roll_back(self, last: int) -> None:
        """Goes back to the checkpoint before the bad steps and skips the batches up to `last`."""
        self.store.wait()
        n_bad = self.in_a_row
        target = self.store.latest_step(last - n_bad)
        c, done = self.config.guard, int(jax.device_get(self.state.guard.rollbacks))
        if done >= c.rollbacks or target is None:
            none = target is None
            there = "there is no checkpoint" if none else f"the checkpoint of step {target} is"
            raise BadNumbers(
                f"config.guard.max_bad_steps={c.max_bad_steps}: {n_bad} steps in a row, up "
                f"to step {last}, had numbers that are not finite or jumped, and were skipped; "
                "lower optimizer.learning_rate in a new --workdir, or look at the data of these "
                f"steps ({there} from before them)"
            )
        watchdog.at("going back", last, slow=True)
        position = last + int(jax.device_get(self.state.guard.offset))
        state = self.store.restore(target, self.program.abstract)
        self.store.delete_after(target)  # saved by a stop within the bad steps: the same state
        counts = {"offset": np.int32(position - target), "rollbacks": np.int32(done + 1)}
        placed = jax.device_put(counts, state.guard.offset.sharding)  # replicated, as all counts
        self.state = state._replace(guard=state.guard._replace(**placed))
        self.step = self.start = target
        self.in_a_row, self.pending, self.ranking_loss = 0, None, None
        self.writer.close()
        self.writer = self.open_writer(target)
        result = f"back to step {target}, leaving out the data of the steps up to {last}"
        self.progress.print(f"{n_bad} bad steps in a row: {result}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def perf_measures(speed: tuple[float, float] | None, config: Config) -> dict[str, Any]:
    """Measures `perf/…` of a speed (`Clock.read`), and of peak memory in this process."""
    found: dict[str, Any] = {}
    if speed is not None:
        found["perf/seconds_per_step"], found["perf/tokens_per_second"] = speed
        flops = train_flops(config.model, config.train.batch_size) / speed[0]
        one_length = config.data.buckets <= 1  # else FLOPs a step vary
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind) if one_length else None
        found["perf/model_flops_per_second"] = flops if one_length else "n/a"
        found["perf/mfu"] = flops / peak / jax.device_count() if peak else "n/a"
    device = jax.local_devices()[0].memory_stats() or {}
    found["perf/device_peak_bytes"] = device.get("peak_bytes_in_use", "n/a")
    found["perf/host_peak_bytes"] = host_peak_bytes()
    return found


class Clock:
    """The speed of steps between two readings, evaluations and saves left out."""

    def __init__(self) -> None:
        self._step: int | None = None  # of the last reading
        self._since, self._tokens = 0.0, 0  # when it was, moved on by pauses; tokens since then

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def count(self, tokens: int) -> None:
        """Counts the tokens of a step, before a reading at it."""
        self._tokens += tokens

    def read(self, step: int) -> tuple[float, float] | None:
        """(Seconds a step, tokens a second) since the last reading; None at the first."""
        first, since, tokens = self._step, self._since, self._tokens
        self._step, self._since, self._tokens = step, time.perf_counter(), 0
        if first is None or step <= first:
            return None
        seconds = max(self._since - since, 1e-9)
        return seconds / (step - first), tokens / seconds
