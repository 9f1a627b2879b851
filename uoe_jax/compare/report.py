"""A finished table as Markdown, CSV and plots, with the rules that make its rows comparable."""

import csv
import datetime
import io
import statistics
from typing import Any, Collection

import jax
from etils import epath

from uoe_jax.compare.table import SMALLEST_MISS, Table
from uoe_jax.compare.workspace import MOST_BATCHES, Result, measure_of, read_measured, results
from uoe_jax.workdir import write_text

# Columns of table.csv that are keys of measured.json.
MEASURED = ["parameters", "active_parameters", "forward_flops_per_token", "train_flops_per_step"]
MEASURED += ["ratio", "ratio_low", "ratio_high", "bytes", "kept_bytes_per_row"]


def write(table: Table, workdir: epath.Path) -> str:
    """Writes `table.md`, `table.csv` and the plots; returns the table for the screen."""
    from uoe_jax.compare.plots import draw

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
        cells += _measured_cells(r.measured)
        if table.rates:
            cells.append("none" if r.rate is None else f"{r.rate:g}")
        lines.append(_line(cells))
    return "\n".join([*lines, "", *rules(table, found, measured), ""])


def _measured_cells(m: dict[str, float]) -> list[str]:
    if not m:
        return ["not measured"] * 6
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
    search = (
        f"No search: learning rate {c.optimizer.learning_rate:g} and its schedule for every row."
    )
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
        m, measure = r.config.model, measure_of(r.config)
        flops = r.measured["train_flops_per_step"] * r.config.train.steps if r.measured else ""
        first, last = [r.name, m.attention, m.mlp, m.all_hidden, measure.name], [r.rate, flops]
        last += [r.measured.get(column, "") for column in MEASURED]
        writer.writerows([*first, seed, value, *last] for seed, value in r.finals.items())
    return out.getvalue()


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
