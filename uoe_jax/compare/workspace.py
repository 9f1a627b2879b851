"""The directory of a table: its files, and what its runs have left there.

The files are these; `rates.json` is of the learning-rate search::

    table.json         the table's configuration and its rows
    rates.json         {row: {learning rate: loss, null where it diverged}}
    rows/ROW/rate_R/   a run of the search
    rows/ROW/seed_N/   a run of the table; holds `diverged` where its numbers went bad
    measured.json      step time, memory and FLOPs of every row, over context lengths too
    table.md, table.csv and plots (.png)
"""

from typing import Any, NamedTuple

from etils import epath

from uoe_jax.config.load import from_dict
from uoe_jax.config.schema import Config
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import read_config, read_json

TABLE, RATES, MEASURED, DIVERGED = "table.json", "rates.json", "measured.json", "diverged"
DAMAGED = "remove it and what it is about, or give another --workdir"
MOST_BATCHES = 256  # of training, whose lengths are counted for measured.json
Losses = dict[str, dict[str, float | None]]  # by row and learning rate; None: diverged
Rates = dict[str, float | None]  # the best one by row; None: all diverged
Curve = list[tuple[int, float]]  # (step, value)


def seed_dir(workdir: epath.Path, slug: str, seed: int) -> epath.Path:
    """The workdir of a row's run."""
    return workdir / "rows" / slug / f"seed_{seed}"


def is_finished(config: Config, run: epath.Path) -> bool:
    """Whether a run has its last evaluation, and its test result if it is to have one."""
    lines = _metrics(run)
    evaluated = any(line["step"] == config.train.steps and "eval/loss" in line for line in lines)
    return evaluated and (not config.eval.test or any("test/loss" in line for line in lines))


def diverged(run: epath.Path) -> bool:
    """Whether a run was given up because its numbers went bad."""
    return (run / DIVERGED).exists()


def _metrics(run: epath.Path) -> list[dict[str, Any]]:
    return read_metrics(run) if (run / "metrics.jsonl").exists() else []


def read_table(workdir: epath.Path) -> dict[str, Any] | None:
    return read_json(workdir / TABLE, DAMAGED)


def read_measured(workdir: epath.Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"made": {}, "rows": {}, "lengths": [], "refused": []}
    return read_json(workdir / MEASURED, DAMAGED) or empty


def read_losses(workdir: epath.Path) -> Losses:
    """The losses of the learning-rate search so far."""
    out: Losses = {}
    try:
        for slug, losses in (read_json(workdir / RATES, DAMAGED) or {}).items():
            out[slug] = {}
            for rate, loss in losses.items():
                out[slug][str(float(rate))] = None if loss is None else float(loss)
    except (AttributeError, TypeError, ValueError) as error:
        why = "holds other things than losses by row and learning rate"
        raise UserError(f"{workdir / RATES}: {why}; {DAMAGED}") from error
    return out


def best_rates(losses: Losses) -> Rates:
    """The learning rate of the lowest loss by row; None where every one diverged."""
    out: Rates = {}
    for slug, of_row in losses.items():
        found = {rate: loss for rate, loss in of_row.items() if loss is not None}
        if of_row:
            out[slug] = float(min(found, key=found.__getitem__)) if found else None
    return out


class Measure(NamedTuple):
    """What rows are ranked by."""

    key: str  # in metrics.jsonl, after the split
    name: str
    lower_is_better: bool
    scale: float = 1.0  # to the unit shown
    digits: int = 4


def measure_of(config: Config) -> Measure:
    if config.model.task == "classify":
        return Measure("accuracy", "% right", False, 100, 2)
    if config.data.tokenizer == "words":
        return Measure("word_perplexity", "perplexity per word", True, digits=2)
    return Measure("bits_per_byte", "bits per byte", True)


class Result(NamedTuple):
    """One row."""

    slug: str
    name: str
    config: Config
    miss: float
    finals: dict[int, float]  # the measure at the end of every finished seed, by seed
    diverged: int  # number of seeds
    curves: list[Curve]  # the measure on validation, of every finished seed
    measured: dict[str, float]  # the row of measured.json; empty where it was not measured
    rate: float | None  # the learning rate of its runs; None where all that were tried diverged


def results(workdir: epath.Path, n_seeds: int) -> list[Result]:
    """Every row in the workdir with a seed that finished or diverged, rows left out now too."""
    measured, rates = read_measured(workdir)["rows"], best_rates(read_losses(workdir))
    out = []
    for slug, row in (read_table(workdir) or {"rows": {}})["rows"].items():
        config = from_dict(row["config"])
        rate = rates.get(slug, config.optimizer.learning_rate)
        finals: dict[int, float] = {}
        curves, n_diverged = [], n_seeds if rate is None else 0
        for seed in range(n_seeds):
            run = seed_dir(workdir, slug, seed)
            if diverged(run):
                n_diverged += 1
            elif found := _finished(config, run):
                config, finals[seed], curve = found
                curves.append(curve)
        if finals or n_diverged:
            found_there = (finals, n_diverged, curves, measured.get(slug, {}), rate)
            out.append(Result(slug, row["name"], config, row["miss"], *found_there))
    return out


def _finished(config: Config, run: epath.Path) -> tuple[Config, float, Curve] | None:
    """(configuration as it ran, final measure, curve) of a run that is finished."""
    lines, measure = _metrics(run), measure_of(config)
    split = "test" if config.eval.test else "eval"
    last = [x for x in lines if f"{split}/loss" in x and x["step"] == config.train.steps]
    if not last:
        return None
    if f"{split}/{measure.key}" not in last[-1]:
        remedy = f"the rows are compared by {measure.name}, which it does not give; use another"
        raise ConfigError("config.data.tokenizer", config.data.tokenizer, remedy)
    evaluations = [x for x in lines if "eval/loss" in x]
    curve = [(x["step"], measure.scale * x[f"eval/{measure.key}"]) for x in evaluations]
    return read_config(str(run)), measure.scale * last[-1][f"{split}/{measure.key}"], curve
