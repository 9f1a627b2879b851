"""What the trainer adds to a step: `python -m benchmarks.trainer [--config=quickstart] [--rounds=4] [--steps=20]`.

Interleaves two loops over the same compiled train step in one process: bare (one batch, already on the device, read once
at the end) and the real `Run.go` (prefetch, metrics, progress lines to a pipe, signals, transfer guard; evaluations and
saves are not due).
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time

import jax

from benchmarks import timing
from uoe_jax.cli import load_config
from uoe_jax.data.pipeline import TrainBatches
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import setup
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.loop import Run
from uoe_jax.train.main import load_data
from uoe_jax.train.metrics import MetricsWriter
from uoe_jax.train.progress import Progress
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import build


class _NoSaves(CheckpointStore):
    def save(self, *_args: object, **_kwargs: object) -> bool:
        return False


def main() -> None:
    options = timing.arguments(__doc__, config="quickstart", rounds=4, steps=20)
    config = load_config(options.config, {"eval.every": "0", "checkpoint.every": "0"})
    setup.start(config)
    config, data = load_data(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    bare_times, trainer_times = [], []
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as workdir, _NoSaves(workdir) as store:
        program = build(config, mesh)
        state = program.init(jax.random.key(0))
        batch = mesh_lib.put_batch(mesh, TrainBatches(data.train, config.train.batch_size, 0)[0])
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)
        for round_ in range(options.rounds):
            start = time.perf_counter()
            for _ in range(options.steps):
                state, metrics = program.train_step(state, batch)
            jax.block_until_ready(state)
            bare_times.append((time.perf_counter() - start) / options.steps)

            first = round_ * options.steps
            sitting = dataclasses.replace(
                config.train, stop_after=first + options.steps, steps=10**6
            )
            run = Run(
                dataclasses.replace(config, train=sitting), data, program, store, lambda *_: MetricsWriter(workdir),
                Progress(10**6, first, io.StringIO()), state, first,
            )  # fmt: skip
            start = time.perf_counter()
            with StopSignal() as signal:
                run.go(signal)
            jax.block_until_ready(run.state)
            trainer_times.append((time.perf_counter() - start) / options.steps)
            state = run.state
            run.writer.close()
    both = {"bare": bare_times, "trainer": trainer_times}
    rows = [{"loop": name, **timing.against(times, bare_times)} for name, times in both.items()]
    timing.finish("trainer", options.out, rows, config=options.config)


if __name__ == "__main__":
    main()
