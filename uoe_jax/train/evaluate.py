"""Evaluation: every row of a split counted once, whatever the batch size."""

from typing import Any, Callable

import jax
import jax.numpy as jnp

from uoe_jax.config.schema import Config
from uoe_jax.data.pipeline import Rows, eval_batches
from uoe_jax.data.prefetch import Prefetcher
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import watchdog
from uoe_jax.train.progress import Progress
from uoe_jax.train.step import Params, Program
from uoe_jax.train.task import Sums, measures, task_of

_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


class Interrupted(Exception):
    """Asked to stop in the middle of an evaluation."""


def evaluate(
    program: Program,
    params: Params,
    rows: Rows,
    config: Config,
    limit: int = 0,
    whole: bool = True,
    step: int | None = None,
    seen: set[Any] | None = None,
    stop: Callable[[], bool] = lambda: False,
    name: str = "eval",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], float]:
    """Measures a split, all of it or (`whole=False`) its first `limit` batches.

    Returns (`<name>/…` measures, the loss that ranks checkpoints): that of the first `limit`
    batches, the same rows every time. step, seen: of the run, for the watchdog. stop: called before
    every batch, alike in all processes; raises Interrupted where it is True.
    """
    size = config.eval_batch_size
    local_rows = mesh_lib.local_rows(program.mesh, size)
    phase = "evaluation" if name == "eval" else "testing"
    progress = Progress(0, silent=True) if progress is None else progress
    seen = set() if seen is None else seen
    n_batches = -(-len(rows) // size)
    if limit and not whole:
        n_batches = min(limit, n_batches)
    total: Sums | None = None
    ranking: Sums | None = None
    batches = eval_batches(rows, size, n_batches, local_rows)
    with Prefetcher(lambda _: next(batches), 0, n_batches) as prefetcher:
        for i in range(n_batches):
            batch = prefetcher.get(i)
            new = is_new("eval", batch, seen)
            watchdog.at(phase, step, slow=new)
            if stop():
                raise Interrupted
            with progress.compiling("the evaluation step", new):
                sums = program.eval_step(params, mesh_lib.put_batch(program.mesh, batch))
            before, total = total, sums if total is None else _add(total, sums)
            jax.block_until_ready(before)  # one batch ahead: a stop must not wait for a queue
            ranking = total if i + 1 == limit else ranking
            progress.count(phase, i + 1, n_batches)
    host = jax.device_get(total)
    found = measures(host, config, name)
    found[f"{name}/rows"] = int(host.rows) // config.model.rows_per_example
    task = task_of(config)
    ranked = host if ranking is None else jax.device_get(ranking)
    return found, task.ranking(task.measures(ranked, config))


def is_new(program: str, batch: dict[str, Any], seen: set[Any]) -> bool:
    """Whether a program meets a batch of such shapes for the first time; adds them to `seen`."""
    shapes = (program, *((key, a.shape) for key, a in sorted(batch.items())))
    new = shapes not in seen
    seen.add(shapes)
    return new
