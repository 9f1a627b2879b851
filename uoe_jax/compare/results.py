"""The results of a table's rows, read from the workdirs of their runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from etils import epath

from uoe_jax.compare import workspace as files
from uoe_jax.compare.table import Table
from uoe_jax.config.schema import Config, from_dict
from uoe_jax.errors import ConfigError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import read_config


class Measure(NamedTuple):
    """What rows are ranked by. key: in metrics.jsonl, after the split. scale: to the unit shown."""

    key: str
    name: str
    lower_is_better: bool
    scale: float = 1.0
    digits: int = 4


PER_BYTE = Measure("bits_per_byte", "bits per byte", True)
ACCURACY = Measure("accuracy", "% right", False, 100, 2)
PER_WORD = Measure("word_perplexity", "perplexity per word", True, digits=2)


class Result(NamedTuple):
    """One row.

    Attributes:
      finals: the measure at the end of every finished seed, by seed. diverged: number of seeds.
      curves: (step, measure on validation) of every finished seed.
      measured: the row of measured.json; empty where it was not measured.
      rate: the learning rate of its runs; None where all that were tried diverged.
    """

    slug: str
    name: str
    config: Config
    miss: float
    finals: dict[int, float]
    diverged: int
    curves: list[list[tuple[int, float]]]
    measured: dict[str, float]
    rate: float | None


def measure_of(config: Config) -> Measure:
    if config.model.task == "classify":
        return ACCURACY
    return PER_WORD if config.data.tokenizer == "words" else PER_BYTE


def results(table: Table, workdir: epath.Path) -> list[Result]:
    """Every row in the workdir with a seed that finished or diverged, rows left out now too."""
    stored = (files.read_table(workdir) or {"rows": {}})["rows"]
    measured = files.read_measured(workdir)["rows"]
    rates = files.best_rates(files.read_losses(workdir))
    found = (
        _result(slug, row, table.config.seeds, workdir, rates, measured.get(slug, {}))
        for slug, row in stored.items()
    )
    return [r for r in found if r.finals or r.diverged]


def _result(
    slug: str,
    row: dict[str, Any],
    seeds: int,
    workdir: epath.Path,
    rates: dict[str, float | None],
    measured: dict[str, float],
) -> Result:
    config = from_dict(row["config"])
    split, measure = "test" if config.eval.test else "eval", measure_of(config)
    finals: dict[int, float] = {}
    curves, bad = [], seeds if rates.get(slug, 0.0) is None else 0
    for seed in range(seeds):
        run = files.seed_dir(workdir, slug, seed)
        if files.diverged(run):
            bad += 1
            continue
        lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
        last = [x for x in lines if f"{split}/loss" in x and x["step"] == config.train.steps]
        if not last:
            continue
        config = read_config(str(run))
        if f"{split}/{measure.key}" not in last[-1]:
            why = f"the rows are compared by {measure.name}, which is unknown with it"
            name = config.data.tokenizer
            raise ConfigError("config.data.tokenizer", name, f"{why}; use another tokenizer")
        finals[seed] = measure.scale * last[-1][f"{split}/{measure.key}"]
        evaluations = [x for x in lines if "eval/loss" in x]
        key = f"eval/{measure.key}"
        curves.append([(x["step"], measure.scale * x[key]) for x in evaluations])
    rate = rates.get(slug, config.optimizer.learning_rate)
    return Result(slug, row["name"], config, row["miss"], finals, bad, curves, measured, rate)
