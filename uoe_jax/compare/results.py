"""The results of a table's rows, read from the workdirs of their runs."""

from typing import Any, NamedTuple

from etils import epath

from uoe_jax.compare import workspace as files
from uoe_jax.compare.table import Table
from uoe_jax.config.load import from_dict
from uoe_jax.config.schema import Config
from uoe_jax.errors import ConfigError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import read_config

Curve = list[tuple[int, float]]  # (step, value)


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
    curves: list[Curve]
    measured: dict[str, float]
    rate: float | None


def measure_of(config: Config) -> Measure:
    if config.model.task == "classify":
        return ACCURACY
    return PER_WORD if config.data.tokenizer == "words" else PER_BYTE


def results(table: Table, workdir: epath.Path) -> list[Result]:
    """Every row in the workdir with a seed that finished or diverged, rows left out now too."""
    stored, n_seeds = (files.read_table(workdir) or {"rows": {}})["rows"], table.config.seeds
    measured = files.read_measured(workdir)["rows"]
    rates = files.best_rates(files.read_losses(workdir))

    def result(slug: str, row: dict[str, Any]) -> Result:
        config = from_dict(row["config"])
        finals: dict[int, float] = {}
        curves, bad = [], n_seeds if rates.get(slug, 0.0) is None else 0
        for seed in range(n_seeds):
            run = files.seed_dir(workdir, slug, seed)
            if files.diverged(run):
                bad += 1
            elif found := _finished(config, run):
                config, finals[seed], curve = found
                curves.append(curve)
        rate = rates.get(slug, config.optimizer.learning_rate)
        of_row = measured.get(slug, {})
        return Result(slug, row["name"], config, row["miss"], finals, bad, curves, of_row, rate)

    found = (result(slug, row) for slug, row in stored.items())
    return [r for r in found if r.finals or r.diverged]


def _finished(config: Config, run: epath.Path) -> tuple[Config, float, Curve] | None:
    """(configuration as it ran, final measure, curve) of a run that is finished."""
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    split, measure = "test" if config.eval.test else "eval", measure_of(config)
    last = [x for x in lines if f"{split}/loss" in x and x["step"] == config.train.steps]
    if not last:
        return None
    if f"{split}/{measure.key}" not in last[-1]:
        remedy = f"the rows are compared by {measure.name}, which it does not give; use another"
        raise ConfigError("config.data.tokenizer", config.data.tokenizer, remedy)
    evaluations, key = [x for x in lines if "eval/loss" in x], f"eval/{measure.key}"
    curve = [(x["step"], measure.scale * x[key]) for x in evaluations]
    final = measure.scale * last[-1][f"{split}/{measure.key}"]
    return read_config(str(run)), final, curve
