"""Evaluation: every row of a split counted once, whatever the batch size."""

from __future__ import annotations

from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp

from uoe_jax.config.schema import Config
from uoe_jax.data.pipeline import Rows, eval_batches
from uoe_jax.data.prefetch import Prefetcher
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import watchdog
from uoe_jax.train.measures import measures
from uoe_jax.train.step import Params, Program
from uoe_jax.train.task import Sums, task_of


class Interrupted(Exception):
    """`stop` said so in the middle of an evaluation."""


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
) -> tuple[dict[str, Any], float]:
    """Measures a split, all of it or (`whole=False`) its first `limit` batches.

    Args:
      step, seen: of the run, and what this process has compiled for; for the patience with processes that do not go on.
      stop: asked before every batch, in every process the same.
      name: what the measures' keys begin with.

    Returns:
      (`<name>/…` measures, what ranks checkpoints, of the first `limit` batches: the same rows at every evaluation).

    Raises:
      Interrupted: `stop` gave True.
    """
    size = config.eval_batch_size
    held = mesh_lib.local_rows(program.devices, size)
    total: Sums | None = None
    ranking: Sums | None = None
    seen = set() if seen is None else seen
    for i, batch in enumerate(
        _ahead(eval_batches(rows, size, 0 if whole else limit, held)), start=1
    ):
        watchdog.at(
            "evaluation" if name == "eval" else "testing", step, slow=is_new(("eval", batch), seen)
        )
        if stop():
            raise Interrupted
        sums = program.eval_step(params, mesh_lib.put_batch(program.devices, batch))
        before = total
        total = sums if total is None else _add(total, sums)
        jax.block_until_ready(
            before
        )  # no further ahead of the device than one batch: a stop must not wait for a queue
        ranking = total if i == limit else ranking
    host = jax.device_get(total)
    found = {
        **measures(host, config, name),
        f"{name}/rows": int(host.rows) // config.model.rows_per_example,
    }
    task = task_of(config)
    return found, task.ranking(
        task.measures(jax.device_get(ranking) if ranking is not None else host, config)
    )


def is_new(what: tuple[str, dict[str, Any]], seen: set[Any]) -> bool:
    """Whether a program meets a batch of such shapes for the first time in this process; remembers it in `seen`."""
    name, batch = what
    shapes = (name, *((key, a.shape) for key, a in sorted(batch.items())))
    new = shapes not in seen
    seen.add(shapes)
    return new


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, made in a thread while the device works."""
    end = object()
    with Prefetcher(lambda _: next(batches, end), 0, 2**62) as prefetcher:
        for i in range(2**62):
            batch = prefetcher.get(i)
            if batch is end:
                return
            yield batch


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
