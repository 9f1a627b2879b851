"""The directory of a table: its files, and what its runs have left there.

The files are these; `rates.json` is of the learning-rate search::

    table.json         the table's configuration and its rows
    rates.json         {row: {learning rate: loss, null where it diverged}}
    rows/ROW/rate_R/   a run of the search
    rows/ROW/seed_N/   a run of the table; holds `diverged` where its numbers went bad
    measured.json      step time, memory and FLOPs of every row, over context lengths too
    table.md, table.csv and plots (.png)
"""

from typing import Any, Iterator

from etils import epath

from uoe_jax.config.schema import Config
from uoe_jax.errors import UserError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import read_json

TABLE, RATES, MEASURED, DIVERGED = "table.json", "rates.json", "measured.json", "diverged"
DAMAGED = "remove it and what it is about, or give another --workdir"
MOST_BATCHES = 256  # of training, whose lengths are counted for measured.json
Losses = dict[str, dict[str, float | None]]  # by row and learning rate; None: diverged


def seed_dir(workdir: epath.Path, slug: str, seed: int) -> epath.Path:
    """The workdir of a row's run."""
    return workdir / "rows" / slug / f"seed_{seed}"


def is_finished(config: Config, run: epath.Path) -> bool:
    """Whether a run has its last evaluation, and its test result if it is to have one."""
    if not (run / "metrics.jsonl").exists():
        return False
    lines = read_metrics(run)
    evaluated = any(line["step"] == config.train.steps and "eval/loss" in line for line in lines)
    return evaluated and (not config.eval.test or any("test/loss" in line for line in lines))


def diverged(run: epath.Path) -> bool:
    """Whether a run was given up because its numbers went bad."""
    return (run / DIVERGED).exists()


def read_table(workdir: epath.Path) -> dict[str, Any] | None:
    return read_json(workdir / TABLE, DAMAGED)


def read_measured(workdir: epath.Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"made": {}, "rows": {}, "lengths": [], "refused": []}
    return read_json(workdir / MEASURED, DAMAGED) or empty


def read_losses(workdir: epath.Path) -> Losses:
    """The losses of the learning-rate search so far."""
    path = workdir / RATES
    known = read_json(path, DAMAGED) or {}
    try:
        return {slug: dict(_numbers(losses)) for slug, losses in known.items()}
    except (AttributeError, TypeError, ValueError) as error:
        why = "holds other things than losses by row and learning rate"
        raise UserError(f"{path}: {why}; {DAMAGED}") from error


def _numbers(losses: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    for rate, loss in losses.items():
        yield str(float(rate)), None if loss is None else float(loss)


def best_rates(losses: Losses) -> dict[str, float | None]:
    """The learning rate of the lowest loss by row; None where every one diverged."""
    out: dict[str, float | None] = {}
    for slug, of_row in losses.items():
        found = {rate: loss for rate, loss in of_row.items() if loss is not None}
        if of_row:
            out[slug] = float(min(found, key=found.__getitem__)) if found else None
    return out
