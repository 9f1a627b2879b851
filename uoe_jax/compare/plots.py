"""Plots of a table as PNG files: curves over steps and FLOPs; time and memory over length."""

import itertools
import statistics
from typing import Any, NamedTuple, Sequence

from etils import epath
from matplotlib.figure import Figure

from uoe_jax.compare.results import Result, measure_of

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
    loss = f"{measure_of(curves[0].config).name}, validation" if curves else ""
    figures = [
        ("steps.png", "step", loss, [_over_seeds(r, 1) for r in curves], False),
        ("flops.png", "TFLOPs of training", loss, [_over_flops(r) for r in measured], False),
    ]
    for key, unit, scale, file in (
        ("seconds", "ms of a step of one row", 1e3, "time.png"),
        ("bytes", "MB of a step of one row", 1e-6, "memory.png"),
    ):
        lines = []
        for r in found:
            own = [(x["length"], scale * x[key]) for x in lengths if x["row"] == r.slug]
            if own:
                x, y = zip(*own)
                lines.append(Line(r.name, x, y, y, y))
        figures.append((file, "tokens of the row", unit, lines, True))
    drawn = [figure for figure in figures if figure[3]]
    for figure in drawn:
        _draw(workdir, *figure)
    return [file for file, *_ in drawn]


def _over_flops(r: Result) -> Line:
    return _over_seeds(r, r.measured["train_flops_per_step"] / 1e12)


def _over_seeds(r: Result, scale: float) -> Line:
    """Over step · scale, at the evaluations that all seeds have."""
    by_step = [dict(curve) for curve in r.curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
    values = [[curve[step] for curve in by_step] for step in steps]
    mean, low, high = ([f(v) for v in values] for f in (statistics.mean, min, max))
    return Line(r.name, [scale * step for step in steps], mean, low, high)


def _draw(
    workdir: epath.Path, file: str, x_name: str, y_name: str, lines: Sequence[Line], log: bool
) -> None:
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
    with (workdir / file).open("wb") as out:
        figure.savefig(out, format="png", dpi=120)
