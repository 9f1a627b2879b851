"""Plots of a table as PNG files: curves over steps and FLOPs; time and memory over length."""

import itertools
import statistics
from typing import Any, NamedTuple, Sequence

from etils import epath
from matplotlib.figure import Figure

from uoe_jax.compare.workspace import Result, measure_of

MARKERS = "os^vDPX*"  # beside ten colours, so that no two rows look alike


class Line(NamedTuple):
    """One row's line, and the range over seeds around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw(found: Sequence[Result], lengths: list[dict[str, Any]], workdir: epath.Path) -> list[str]:
    """Writes the plots for which there is data; returns the names of the files."""
    curves = [r for r in found if r.curves]
    measured = [r for r in curves if r.measured]
    tflops = [r.measured["train_flops_per_step"] / 1e12 for r in measured]
    times = _over_lengths(found, lengths, "seconds", 1e3)
    sizes = _over_lengths(found, lengths, "bytes", 1e-6)
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


def _over_lengths(
    found: Sequence[Result], lengths: list[dict[str, Any]], key: str, scale: float
) -> list[Line]:
    lines = []
    for r in found:
        own = [x for x in lengths if x["row"] == r.slug]
        if own:
            y = [scale * x[key] for x in own]
            lines.append(Line(r.name, [x["length"] for x in own], y, y, y))
    return lines


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
