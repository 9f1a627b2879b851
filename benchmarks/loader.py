"""How many times faster the loader makes batches than the model takes them.

    python -m benchmarks.loader [--config=quickstart] [--config.KEY=VALUE …]

Interleaves, in one process, batches made by one thread and steps of the compiled train step on one
batch. Half a minute for the quickstart on 2 cores, most of it compilation.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time

import jax

from benchmarks import timing
from uoe_jax import cli
from uoe_jax.data.pipeline import TrainBatches
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import setup
from uoe_jax.train.main import load_data
from uoe_jax.train.step import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40, help="made in a round")
    parser.add_argument("--steps", type=int, default=4, help="trained in a round")
    parser.add_argument("--out", type=pathlib.Path, default=timing.OUT)
    overrides, rest = cli._overrides(sys.argv[1:])
    options = parser.parse_args(rest)
    config = cli.load_config(options.config, overrides)
    setup.start(config)
    config, data = load_data(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    made, trained = [], []
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        state = program.init(jax.random.key(0))
        batches = TrainBatches(data.train, config.train.batch_size, config.train.seed)
        batch = mesh_lib.put_batch(mesh, batches[0])
        state, found = program.train_step(state, batch)
        tokens = int(found["sums"].tokens)  # waits for the step, too
        for round_ in range(options.rounds):
            start = time.perf_counter()
            for i in range(options.batches):
                batches[1 + round_ * options.batches + i]
            made.append((time.perf_counter() - start) / options.batches)
            start = time.perf_counter()
            for _ in range(options.steps):
                state, found = program.train_step(state, batch)
            jax.block_until_ready(state)
            trained.append((time.perf_counter() - start) / options.steps)
    rows = [{"what": "model", "tokens_per_s": tokens / statistics.median(trained)}]
    ratios = {k: v for k, v in timing.against(trained, made).items() if k != "seconds"}
    rate = tokens / statistics.median(made)
    rows.append({"what": "loader", "tokens_per_s": rate, **ratios})
    timing.finish("loader", options.out, rows, config=options.config)


if __name__ == "__main__":
    main()
