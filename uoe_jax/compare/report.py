"""A finished table as Markdown, CSV and plots, with the rules that make its rows comparable."""

import csv
import datetime
import io
import itertools
import statistics
from typing import Any, Collection, NamedTuple, Sequence

import jax
from etils import epath
from matplotlib.figure import Figure

from uoe_jax.compare.table import SMALLEST_MISS, Table
from uoe_jax.compare.workspace import MOST_BATCHES, Result, measure_of, read_measured, results
from uoe_jax.workdir import write_text

MARKERS = "os^vDPX*"  # beside ten colours, so that no two rows look alike
# Columns of table.csv that are keys of measured.json.
MEASURED = ["parameters", "active_parameters", "forward_flops_per_token", "train_flops_per_step"]
MEASURED += ["ratio", "ratio_low", "ratio_high", "bytes", "kept_bytes_per_row"]


def write(table: Table, workdir: epath.Path) -> str:
    """Writes `table.md`, `table.csv` and the plots; returns the table for the screen."""
    found, measured = results(workdir, table.config.seeds), read_measured(workdir)
    write_text(workdir / "table.csv", as_csv(found))
    plots = draw(found, measured["lengths"], workdir)
    text = as_markdown(table, found, measured)
    shown = "\n".join(f"![{name}]({name})" for name in plots)
    write_text(workdir / "table.md", f"{text}\n{shown}\n")
    files = ", ".join(str(workdir / name) for name in ("table.md", "table.csv", *plots))
    return f"{text}\nwritten: {files}"


def spread(finals: Collection[float], digits: int) -> str:
    """'2.5312 ± 0.0121': mean and sample standard deviation over seeds."""
    if not finals:
        return "diverged"
    mean = f"{statistics.mean(finals):.{digits}f}"
    return f"{mean} ± {statistics.stdev(finals):.{digits}f}" if len(finals) > 1 else mean


def as_markdown(table: Table, found: list[Result], measured: dict[str, Any]) -> str:
    """The table, best row first, and its rules. measured: measured.json."""
    config = table.reference.config
    measure, split = measure_of(config), "test" if config.eval.test else "validation"
    head = ["row", f"{measure.name}, {split}", "seeds", "parameters", "active", "MFLOPs a token"]
    head += ["time of a step", "memory of a step", "activations kept a row"]
    head += ["learning rate"] * bool(table.rates)
    sign = 1 if measure.lower_is_better else -1

    def rank(r: Result) -> tuple[bool, float]:
        return not r.finals, sign * statistics.mean(r.finals.values() or [0])

    lines = [f"# {table.config.title or 'Comparison'}", "", _line(head)]
    lines.append(_line(["---", *["---:"] * (len(head) - 1)]))
    for r in sorted(found, key=rank):
        cells = [r.name + " *" * (abs(r.miss) > SMALLEST_MISS)]
        cells.append(spread(r.finals.values(), measure.digits))
        cells.append(str(len(r.finals)) + f" ({r.diverged} diverged)" * bool(r.diverged))
        cells += _measured_cells(r.measured) if r.measured else ["not measured"] * 6
        if table.rates:
            cells.append("none" if r.rate is None else f"{r.rate:g}")
        lines.append(_line(cells))
    return "\n".join([*lines, "", *rules(table, found, measured), ""])


def _measured_cells(m: dict[str, float]) -> list[str]:
    counts = [f"{m[key] / 1e6:.3f} M" for key in ("parameters", "active_parameters")]
    time = f"{m['ratio']:.2f} ({m['ratio_low']:.2f}-{m['ratio_high']:.2f})"
    memory = [f"{m['bytes'] / 1e6:.1f} MB", f"{m['kept_bytes_per_row'] / 1e3:.0f} kB"]
    return [*counts, f"{m['forward_flops_per_token'] / 1e6:.3f}", time, *memory]


MATCHED = {
    "width": "by width: hidden width {d_hidden} in all MLPs; the experts of a mixture, shared ones "
    "included, have it together (or the largest multiple of their number below it)",
    "flops": "by FLOPs: the hidden width is such that a forward pass in evaluation, without the "
    "vocabulary's scores, costs what that of {reference!r} does",
}
MISSED = {
    "width": "the experts do not divide it",
    "flops": "no width does that, as the attention alone costs more or less, "
    "or a step of the width does",
}


def rules(table: Table, found: list[Result], measured: dict[str, Any]) -> list[str]:
    """What was held alike, and what the columns mean; one line each."""
    c, t, m = table.reference.config, table.config, table.reference.config.model
    steps, batch = c.train.steps, c.train.batch_size
    rates = ", ".join(f"{r:g}" for r in table.rates)
    matched = MATCHED[t.match].format(d_hidden=m.d_hidden, reference=t.reference)
    missed = ", ".join(f"{r.name} {r.miss:+.0%}" for r in found if abs(r.miss) > SMALLEST_MISS)
    split = "validation, which also chose the learning rate" if rates else "validation"
    if c.eval.test:
        split = "test, read once, of the checkpoint that is best on validation"
    search = f"No search: learning rate {c.optimizer.learning_rate:g} and one schedule everywhere."
    if rates:
        search = f"Same search for every row: learning rates {rates}, {table.search_steps:,} steps "
        search += "each with seed 0, the best on validation."
    made = f"jax {jax.__version__}"
    if about := measured["made"]:
        made = f"{about['devices']}, jax {about['jax']}, Python {about['python']}"
    full, plotted = "", ""
    if c.data.buckets > 1:
        full = " of full rows"
        plotted = f" The plot's are of the lengths of the first {MOST_BATCHES} training batches."
    out = [
        f"Same data in the same order for every row of a seed: {steps * batch:,} rows of up to "
        f"{m.context_length} tokens ({steps:,} steps of {batch}) of {c.data.source}; "
        f"D={m.d_model}, {m.n_layers} layers, {m.n_heads} heads.",
        f"Rows are matched {matched}.",
        f"Marked *: {MISSED[t.match]}: {missed}." if missed else "",
        search,
        "Nothing else was searched for here: unions are routed as the table's experiment says, "
        "mixtures and other attentions as their presets and rows do.",
        f"The measure is of {split}, at the end of training; mean ± sample standard deviation over "
        "seeds, which draw initialisation and data order. Seeds that diverged are counted and not "
        "in the mean.",
        f"FLOPs are counted (forward pass{full}, slots whether filled or not; active parameters: "
        f"what a token meets, of XMoE what is expected).{plotted} Activations kept are those of "
        "the forward pass of one row for the backward pass (model.remat='slots').",
        f"Time of a step: relative to {t.reference!r}, measured in turn with it in one process, "
        f"the median of {t.rounds} rounds and the quartiles; memory: what the compiler needs for a "
        "step.",
        *(f"Not measured at {n} tokens: {row} ({why})." for row, n, why in measured["refused"]),
        f"{datetime.date.today().isoformat()}, {made}.",
    ]
    return [f"- {line}" for line in out if line]


def as_csv(found: list[Result]) -> str:
    """One line for every row and seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = "row,attention,mlp,hidden,measure,seed,value,learning_rate,train_flops"
    writer.writerow([*head.split(","), *MEASURED])
    for r in found:
        m, hidden = r.config.model, r.config.model.routed_hidden + r.config.model.whole_hidden
        first = [r.name, m.attention, m.mlp, hidden, measure_of(r.config).name]
        flops = r.measured["train_flops_per_step"] * r.config.train.steps if r.measured else ""
        last = [r.rate, flops, *(r.measured.get(column, "") for column in MEASURED)]
        writer.writerows([*first, seed, value, *last] for seed, value in r.finals.items())
    return out.getvalue()


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


Lengths = list[dict[str, Any]]  # those of measured.json


class Line(NamedTuple):
    """One row's line, and the range over seeds around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw(found: Sequence[Result], lengths: Lengths, workdir: epath.Path) -> list[str]:
    """Writes the plots for which there is data; returns the names of the files."""
    curves = [r for r in found if r.curves]
    measured = [r for r in curves if r.measured]
    tflops = [r.measured["train_flops_per_step"] / 1e12 for r in measured]
    times = [line for r in found for line in _over_lengths(r, lengths, "seconds", 1e3)]
    sizes = [line for r in found for line in _over_lengths(r, lengths, "bytes", 1e-6)]
    loss = f"{measure_of(curves[0].config).name}, validation" if curves else ""
    figures = {
        "steps.png": ([_over_seeds(r, 1) for r in curves], "step", loss),
        "flops.png": ([*map(_over_seeds, measured, tflops)], "TFLOPs of training", loss),
        "time.png": (times, "tokens of the row", "ms of a step of one row"),
        "memory.png": (sizes, "tokens of the row", "MB of a step of one row"),
    }
    drawn = {file: figure for file, figure in figures.items() if figure[0]}
    for file, figure in drawn.items():
        _draw(workdir / file, *figure, log=file in ("time.png", "memory.png"))
    return [*drawn]


def _over_lengths(r: Result, lengths: Lengths, key: str, scale: float) -> list[Line]:
    own = [x for x in lengths if x["row"] == r.slug]
    y = [scale * x[key] for x in own]
    return [Line(r.name, [x["length"] for x in own], y, y, y)] if own else []


def _over_seeds(r: Result, scale: float) -> Line:
    """Over step · scale, at the evaluations that all seeds have."""
    by_step = [dict(curve) for curve in r.curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
    values = [[curve[step] for curve in by_step] for step in steps]
    mean, low, high = ([f(v) for v in values] for f in (statistics.mean, min, max))
    return Line(r.name, [scale * step for step in steps], mean, low, high)


def _draw(path: epath.Path, lines: Sequence[Line], x_name: str, y_name: str, log: bool) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (line, marker) in enumerate(zip(lines, itertools.cycle(MARKERS))):
        look: dict[str, Any] = dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
        axes.plot(line.x, line.y, label=line.name, marker=marker, markersize=4, **look)
        axes.fill_between(line.x, line.low, line.high, alpha=0.15, color=look["color"])
    axes.set(xlabel=x_name, ylabel=y_name)
    if log:
        ticks = sorted({n for line in lines for n in line.x})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, labels=[str(n) for n in ticks], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    with path.open("wb") as out:
        figure.savefig(out, format="png", dpi=120)
