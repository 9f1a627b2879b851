"""A finished table as Markdown, CSV and plots, with the rules by which its rows were made alike."""

from __future__ import annotations

import csv
import datetime
import io
import statistics
from typing import Any, Collection, NamedTuple

import jax
from etils import epath

from uoe_jax.compare.measure import MOST_BATCHES
from uoe_jax.compare.run import DAMAGED, best_rates, diverged, searched_losses
from uoe_jax.compare.table import SMALLEST_MISS, Table
from uoe_jax.config.load import from_dict
from uoe_jax.config.schema import Config
from uoe_jax.errors import ConfigError
from uoe_jax.train.metrics import read_metrics
from uoe_jax.workdir import read_config, read_json, write_text


class Measure(NamedTuple):
    """What a table ranks by. key: in metrics.jsonl, behind the split; scale: of a person's unit."""

    key: str
    name: str
    lower_is_better: bool
    scale: float = 1.0
    digits: int = 4


PER_BYTE = Measure("bits_per_byte", "bits per byte", True)
RIGHT = Measure("accuracy", "% right", False, 100, 2)
PER_WORD = Measure("word_perplexity", "perplexity per word", True, digits=2)


class Result(NamedTuple):
    """One row as it came out.

    Attributes:
      finals: the measure of every seed that finished, by seed. diverged: how many did not, as their numbers went bad.
      curves: of every seed, (step, measure on validation).
      measured: of `measure.measure`; empty where it was not measured.
      rate: the learning rate that it was trained with; None: none of those tried suits it.
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
        return RIGHT
    return PER_WORD if config.data.tokenizer == "words" else PER_BYTE


def results(table: Table, workdir: epath.Path) -> list[Result]:
    """Every row of the table that has a finished seed, those that were left out of this call too."""
    stored = (read_json(workdir / "table.json", DAMAGED) or {"rows": {}})["rows"]
    measured = (read_json(workdir / "measured.json", DAMAGED) or {"rows": {}})["rows"]
    rates = best_rates(searched_losses(workdir))
    out = []
    for slug, row in stored.items():
        config = from_dict(row["config"])
        split, measure = "test" if config.eval.test else "eval", measure_of(config)
        finals: dict[int, float] = {}
        curves, bad = [], table.config.seeds if rates.get(slug, 0.0) is None else 0
        for seed in range(table.config.seeds):
            place = workdir / "rows" / slug / f"seed_{seed}"
            if diverged(place):
                bad += 1
                continue
            lines = read_metrics(place) if (place / "metrics.jsonl").exists() else []
            last = [
                line
                for line in lines
                if f"{split}/loss" in line and line["step"] == config.train.steps
            ]
            if last:
                config = read_config(str(place))
                if f"{split}/{measure.key}" not in last[-1]:
                    remedy = f"the rows are compared by {measure.name}, which is unknown with it; use another tokenizer"
                    raise ConfigError("config.data.tokenizer", config.data.tokenizer, remedy)
                finals[seed] = measure.scale * last[-1][f"{split}/{measure.key}"]
                curves.append(
                    [
                        (line["step"], measure.scale * line[f"eval/{measure.key}"])
                        for line in lines
                        if "eval/loss" in line
                    ]
                )
        if finals or bad:
            rate = rates.get(slug, config.optimizer.learning_rate)
            out.append(
                Result(
                    slug,
                    row["name"],
                    config,
                    row["miss"],
                    finals,
                    bad,
                    curves,
                    measured.get(slug, {}),
                    rate,
                )
            )
    return out


def write(table: Table, workdir: epath.Path) -> str:
    """Writes `table.md`, `table.csv` and the plots; returns the table for the screen."""
    from uoe_jax.compare.plots import draw

    found = results(table, workdir)
    told = read_json(workdir / "measured.json", DAMAGED) or {
        "made": {},
        "lengths": [],
        "refused": [],
    }
    write_text(workdir / "table.csv", as_csv(found))
    pictures = draw(found, told["lengths"], workdir)
    text = as_markdown(table, found, told)
    shown = "\n".join(f"![{name}]({name})" for name in pictures)
    write_text(workdir / "table.md", f"{text}\n{shown}\n")
    return f"{text}\nwritten: {', '.join(str(workdir / name) for name in ('table.md', 'table.csv', *pictures))}"


def spread(finals: Collection[float], digits: int) -> str:
    """'2.5312 ± 0.0121': mean and sample standard deviation over seeds."""
    if not finals:
        return "diverged"
    mean = f"{statistics.mean(finals):.{digits}f}"
    return f"{mean} ± {statistics.stdev(finals):.{digits}f}" if len(finals) > 1 else mean


def as_markdown(table: Table, found: list[Result], told: dict[str, Any]) -> str:
    measure = measure_of(table.reference.config)
    split = "test" if table.reference.config.eval.test else "validation"
    head = [
        "row", f"{measure.name}, {split}", "seeds", "parameters", "active", "MFLOPs a token", "time of a step", "memory of a step",
        "activations kept a row",
    ]  # fmt: skip
    searched = bool(table.rates)
    head += ["learning rate"] * searched
    sign = 1 if measure.lower_is_better else -1
    ordered = sorted(
        found, key=lambda r: (not r.finals, sign * statistics.mean(r.finals.values() or [0]))
    )
    lines = [
        f"# {table.config.title or 'Comparison'}",
        "",
        _line(head),
        _line(["---", *["---:"] * (len(head) - 1)]),
    ]
    for r in ordered:
        m = r.measured
        mark = " *" if abs(r.miss) > SMALLEST_MISS else ""
        cells = [
            r.name + mark,
            spread(r.finals.values(), measure.digits),
            f"{len(r.finals)}" + (f" ({r.diverged} diverged)" if r.diverged else ""),
        ]
        cells += (
            [f"{m['parameters'] / 1e6:.3f} M", f"{m['active_parameters'] / 1e6:.3f} M", f"{m['forward_flops_per_token'] / 1e6:.3f}",
             f"{m['ratio']:.2f} ({m['ratio_low']:.2f}-{m['ratio_high']:.2f})", f"{m['bytes'] / 1e6:.1f} MB", f"{m['kept_bytes_per_row'] / 1e3:.0f} kB"]
            if m else ["not measured"] * 6
        )  # fmt: skip
        lines.append(_line(cells + ["none" if r.rate is None else f"{r.rate:g}"] * searched))
    return "\n".join([*lines, "", *rules(table, found, told), ""])


def rules(table: Table, found: list[Result], told: dict[str, Any]) -> list[str]:
    """What was held alike, and what the columns are; one line each."""
    c, t = table.reference.config, table.config
    rows_seen = c.train.steps * c.train.batch_size
    matched = {
        "width": f"matched by width: hidden width {c.model.d_hidden} in all MLPs; the experts of a mixture, shared ones too, have it together "
        "(or the largest multiple of their number below it)",
        "flops": f"matched by operations: the hidden width is such that a forward pass in evaluation, words left out, costs what that of {t.reference!r} does",
    }[t.match]
    out = [
        f"- Same data in the same order for every row of a seed: {rows_seen:,} rows of up to {c.model.context_length} tokens "
        f"({c.train.steps:,} steps of {c.train.batch_size}) of {c.data.source}; D={c.model.d_model}, {c.model.n_layers} layers, {c.model.n_heads} heads.",
        f"- Rows are {matched}.",
    ]
    far = [f"{r.name} {r.miss:+.0%}" for r in found if abs(r.miss) > SMALLEST_MISS]
    why = {
        "width": "the experts do not divide it",
        "flops": "no width does that, as the attention alone costs more or less, or a step of the width does",
    }
    out += [f"- Marked *: {why[t.match]}: {', '.join(far)}."] if far else []
    if table.rates:
        tried = ", ".join(f"{rate:g}" for rate in table.rates)
        out.append(
            f"- Same search for every row: learning rates {tried}, {table.search_steps:,} steps each with seed 0, the best on validation."
        )
    else:
        out.append(
            f"- No search: learning rate {c.optimizer.learning_rate:g} and the same schedule for every row."
        )
    out.append(
        "- Nothing else was searched for here: unions are routed as the table's experiment says, mixtures and other attentions as their presets and rows do."
    )
    several = c.data.buckets > 1
    which = (
        "test, read once, of the checkpoint that is best on validation"
        if c.eval.test
        else "validation, which also chose the learning rate"
    )
    out += [
        f"- The measure is of {which if table.rates or c.eval.test else 'validation'}, at the end of training; mean ± sample standard deviation "
        "over seeds, which draw initialisation and data order. Seeds that diverged are counted and not in the mean.",
        f"- Operations are counted (forward pass{' of full rows' * several}, slots whether filled or not; active parameters: what a token meets, of XMoE what is "
        f"expected). {f'In the picture, those of training are of the lengths of the first {MOST_BATCHES} batches. ' * several}Activations kept are those of the forward pass of one row for the backward pass (model.remat='slots').",
        f"- Time of a step: relative to {t.reference!r}, measured in turn with it in one process, the median of {t.rounds} rounds and "
        "the quartiles; memory: what the compiler needs for a step.",
    ]
    out += [
        f"- Not measured at {length} tokens: {row} ({why})." for row, length, why in told["refused"]
    ]
    made = told["made"]
    devices = (
        f"{made['devices']}, jax {made['jax']}, Python {made['python']}"
        if made
        else f"jax {jax.__version__}"
    )
    return [*out, f"- {datetime.date.today().isoformat()}, {devices}."]


def as_csv(found: list[Result]) -> str:
    """One line a row and seed."""
    out = io.StringIO()
    columns = [
        "parameters",
        "active_parameters",
        "forward_flops_per_token",
        "train_flops_per_step",
        "ratio",
        "ratio_low",
        "ratio_high",
        "bytes",
        "kept_bytes_per_row",
    ]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "row",
            "attention",
            "mlp",
            "hidden",
            "measure",
            "seed",
            "value",
            "learning_rate",
            "train_flops",
            *columns,
        ]
    )
    for r in found:
        m, measure = r.config.model, measure_of(r.config)
        flops = r.measured["train_flops_per_step"] * r.config.train.steps if r.measured else ""
        for seed, value in r.finals.items():
            writer.writerow(
                [
                    r.name,
                    m.attention,
                    m.mlp,
                    m.all_hidden,
                    measure.name,
                    seed,
                    value,
                    r.rate,
                    flops,
                    *(r.measured.get(c, "") for c in columns),
                ]
            )
    return out.getvalue()


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
