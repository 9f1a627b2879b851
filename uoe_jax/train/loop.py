"""`uoe train`: the run from its first line to its last."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any, Callable, Iterator

import jax
from etils import epath

from uoe_jax import mesh as mesh_lib
from uoe_jax import processes
from uoe_jax.config import Config, to_dict
from uoe_jax.data.pipeline import DataBundle, Prefetcher, TrainBatches, default_cache_dir, load
from uoe_jax.data.tokenizer import Tokenizer
from uoe_jax.errors import EXIT_DONE, EXIT_STOPPED, BadNumbers, ConfigError
from uoe_jax.flops import PEAK_FLOPS, train_flops
from uoe_jax.processes import by_first, is_first
from uoe_jax.runtime import describe_devices
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.evaluate import evaluate
from uoe_jax.train.measures import measures
from uoe_jax.train.metrics import MetricsWriter, Progress, Silent, read_metrics
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import Params, Program, TrainState, build
from uoe_jax.workdir import check_record, enter_workdir


def load_data(config: Config) -> tuple[Config, DataBundle]:
    """The data, and the configuration with what they settle filled in."""
    model, data = config.model, config.data
    if not model.causal:
        remedy = f"it would see the tokens of data.source={data.source!r} that it is to predict; use True"
        raise ConfigError("config.model.causal", model.causal, remedy)
    bundle = load(
        data.source, data.path, data.tokenizer, model.context_length, model.patch_multiple, default_cache_dir()
    )
    return with_vocabulary(config, bundle.tokenizer.vocab_size), bundle


def with_vocabulary(config: Config, size: int) -> Config:
    """The configuration with the tokenizer's vocabulary size filled in; ConfigError where the model's is too small."""
    given = config.model.vocab_size
    if given and given < size:
        raise ConfigError("config.model.vocab_size", given, f"the tokenizer has {size} tokens; give at least that, or 0")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=given or size))


def train(config: Config, workdir_name: str, sample: Callable[[Config, Program, Params, Tokenizer], str]) -> int:
    """Trains the configured model in a workdir, or goes on with the run that is there; returns the exit code.

    sample: makes the text shown at the end.

    Order of a run:
      1. resume from the newest checkpoint of the workdir, else initialise;
      2. per step: evaluate if due (the state about to be trained) -> save if due -> stop if asked -> fetch batch(step)
         -> dispatch the step -> read the previous step's measures -> log;
      3. at the end: evaluate, save, and show what came of it.
    A metrics line of step s, a checkpoint s and `state.step` = s all speak of the state after s updates.
    """
    config, data = agreed_data(config)
    workdir = enter_workdir(workdir_name, config)
    by_first(lambda: check_record(workdir, data.record))
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh), CheckpointStore(workdir, config.checkpoint.keep_latest, config.checkpoint.keep_best) as store:
        program = build(config, mesh)
        state, start = _first_state(program, store, config)
        progress = Progress(config.train.steps, start) if is_first() else Silent()
        writer = _open_writer(workdir, start)
        run = Run(config, data, program, store, writer, progress, state, start)
        try:
            progress.say(run.welcome(workdir_name))
            exit_code = run.go()
        finally:
            progress.close()
            writer.close()
        text = sample(config, program, run.state.params, data.tokenizer) if run.step == config.train.steps else ""
        if is_first():
            print(run.farewell(workdir_name, exit_code, text))
    return exit_code


def agreed_data(config: Config, **options: Any) -> tuple[Config, DataBundle]:
    """`load_data`, in every process the same, as are the options; what goes wrong in one is the error of all."""
    processes.same_command(config, **options)
    config, data = processes.together(lambda: load_data(config))
    found = {f"data.{name}": data.record.get(name) for name in ("sha256", "tokenizer")}
    processes.same(found, "give every machine the same data and the same interpreter")
    return config, data


def _open_writer(workdir: epath.Path, start: int) -> MetricsWriter | Silent:
    """The writer of metrics in process 0; its errors are those of all."""
    made: list[MetricsWriter] = []
    by_first(lambda: made.append(MetricsWriter(workdir, resume_step=start or None)))
    return made[0] if made else Silent()


def _first_state(program: Program, store: CheckpointStore, config: Config) -> tuple[TrainState, int]:
    newest = store.latest_step()
    if newest is None:
        return program.init(jax.random.key(config.train.seed)), 0
    return store.restore(newest, program.abstract), newest


class Run:
    """The state of a running `uoe train` on the host; `go` is the loop."""

    def __init__(
        self,
        config: Config,
        data: DataBundle,
        program: Program,
        store: CheckpointStore,
        writer: MetricsWriter | Silent,
        progress: Progress | Silent,
        state: TrainState,
        start: int,
    ) -> None:
        self.config, self.data, self.program, self.state = config, data, program, state
        self.store, self.writer, self.progress = store, writer, progress
        self.start, self.step = start, start
        self.stop = min(config.train.stop_after or config.train.steps, config.train.steps)
        self.pending: tuple[int, Any] | None = None  # (step, measures still on the device)
        self.ranking_loss: float | None = None  # of the state at self.step, where it was evaluated
        self.clock = Clock()

    def go(self) -> int:
        """Runs until done (0) or asked to stop (75)."""
        c, program = self.config, self.program
        rows = mesh_lib.local_rows(program.mesh, c.train.batch_size)
        batches = TrainBatches(self.data.train, c.train.batch_size, c.train.seed, rows)
        fetch = lambda step: mesh_lib.put_batch(program.mesh, batches[step])  # noqa: E731
        with StopSignal() as signal, Prefetcher(fetch, self.start, self.stop) as prefetcher:
            with jax.transfer_guard("disallow"):
                while self.step < self.stop:
                    if self.step > self.start:  # what is due at the first step was done before the stop
                        if _due(self.step, c.eval.every):
                            self.evaluate()
                        if _due(self.step, c.checkpoint.every):
                            self.save()
                    self.store.check()
                    if signal.due(self.step):
                        self.save()
                        self.store.wait()
                        return EXIT_STOPPED
                    batch = prefetcher.get(self.step)
                    self.state, on_device = program.train_step(self.state, batch)
                    self.step += 1
                    self.ranking_loss = None
                    self.log_pending()
                    self.pending = (self.step, on_device)
                if self.step > self.start:
                    if self.step == c.train.steps or _due(self.step, c.eval.every):
                        self.evaluate()
                    self.save()
                self.store.wait()
        return EXIT_DONE

    def evaluate(self) -> None:
        """Measures the current state on the validation split."""
        self.log_pending()
        with self.clock.paused():
            limit, last = self.config.eval.batches, self.step == self.config.train.steps
            found, self.ranking_loss = evaluate(
                self.program, self.state.params, self.data.validation, self.config, limit, whole=last or not limit
            )
            self.writer.write(self.step, found)
        self.progress.say(
            f"step {self.step}: validation loss {found['eval/loss']:.4f}, "
            f"{found['eval/bits_per_byte']:.4f} bits per byte ({found['eval/rows']} rows)"
        )

    def save(self) -> None:
        """Starts to save the current state; every line of metrics up to it is on the disk first."""
        self.log_pending()
        with self.clock.paused():
            self.writer.flush()
            metrics = None if self.ranking_loss is None else {"loss": self.ranking_loss}
            kept = {"config": to_dict(self.config), "data": self.data.record}
            with jax.transfer_guard("allow"):  # Orbax copies to the host as it sees fit
                self.store.save(self.step, self.state, metrics, kept)

    def log_pending(self) -> None:
        """Reads and logs the measures of the step dispatched before this one."""
        if self.pending is None:
            return
        (step, on_device), self.pending = self.pending, None
        last = step == self.config.train.steps
        if step % self.config.train.log_every and not last and step != self.start + 1:
            return
        host = jax.device_get(on_device)
        found = measures(host["sums"], self.config.model.routed(), "train")
        found["train/grad_norm"] = float(host["grad_norm"])
        found["train/learning_rate"] = float(host["learning_rate"])
        found["train/tokens"] = int(host["sums"].tokens)
        if not (math.isfinite(found["train/loss"]) and math.isfinite(found["train/grad_norm"])):
            raise BadNumbers(
                f"train/loss={found['train/loss']} at step {step}: not finite; lower optimizer.learning_rate, then run "
                "the same command in a new --workdir (the checkpoints before this step are kept)"
            )
        seconds = self.clock.per_step(step)
        if seconds is not None:
            flops = train_flops(self.config.model, self.config.train.batch_size) / seconds
            peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
            found["perf/seconds_per_step"] = seconds
            found["perf/tokens_per_second"] = found["train/tokens"] / seconds
            found["perf/model_flops_per_second"] = flops
            found["perf/mfu"] = flops / peak / jax.device_count() if peak else "n/a"
        if step % self.config.train.log_every == 0 or last:
            self.writer.write(step, found)
        speed = found.get("perf/tokens_per_second")
        self.progress.update(step, found["train/loss"], found["train/bits_per_byte"], speed)

    def welcome(self, workdir: str) -> str:
        c, n = self.config, sum(x.size for x in jax.tree.leaves(self.program.abstract.params))
        where = f"resuming at step {self.start}" if self.start else "starting"
        if self.start >= c.train.steps:
            where = f"nothing left to train, {self.start} of {c.train.steps} steps are done,"
        return (
            f"{where} in {workdir}: {c.model.attention} + {c.model.mlp}, {c.model.n_layers} layers, D={c.model.d_model}, "
            f"{n / 1e6:.2f}M parameters, {c.train.steps} steps of {c.train.batch_size} x {c.model.context_length} tokens "
            f"on {describe_devices()}"
        )

    def farewell(self, workdir: str, exit_code: int, sample: str) -> str:
        if exit_code == EXIT_STOPPED:
            return f"stopped at step {self.step} with everything saved; the same command goes on from there"
        if self.step < self.config.train.steps:
            return f"step {self.step} of {self.config.train.steps} reached and saved; the same command goes on from there"
        evaluated = [line for line in read_metrics(workdir) if "eval/loss" in line][-1:]
        return "\n".join(
            [
                *(
                    f"validation at step {line['step']}: loss {line['eval/loss']:.4f}, "
                    f"{line['eval/bits_per_byte']:.4f} bits per byte over {line['eval/rows']} rows"
                    for line in evaluated
                ),
                "a sample:",
                *("  | " + line for line in sample.splitlines()),
                "next:",
                f"  uoe eval --workdir={workdir} --split=test",
                f"  uoe generate --workdir={workdir} --prompt='class '",
            ]
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Clock:
    """Seconds per step between two readings, evaluations and saves left out."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._pause = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - since

    def per_step(self, step: int) -> float | None:
        """Mean seconds a step since the last reading; None at the first, which only waited for the compiler."""
        now, last = time.perf_counter(), self._last
        self._last = (step, now)
        pause, self._pause = self._pause, 0.0
        if last is None or step <= last[0]:
            return None
        return max(now - last[1] - pause, 1e-9) / (step - last[0])
