"""Plots of a table as PNG files: curves over steps and over operations, time and memory over the context length."""

from __future__ import annotations

import itertools
import statistics
from typing import Any, Sequence

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
from etils import epath

from uoe_jax.compare.report import Result, measure_of

MARKS = (
    "o",
    "s",
    "^",
    "v",
    "D",
    "P",
    "X",
    "*",
)  # beside ten colours, so that no two rows look alike


def draw(found: Sequence[Result], lengths: list[dict[str, Any]], workdir: epath.Path) -> list[str]:
    """Writes what can be drawn; returns the files' names."""
    out = []
    curves = [r for r in found if r.curves]
    if curves:
        name = measure_of(curves[0].config).name
        out.append(
            _figure(
                workdir,
                "steps.png",
                "step",
                f"{name}, validation",
                [(r.name, *_over_seeds(r, 1)) for r in curves],
            )
        )
        over = [
            (r.name, *_over_seeds(r, r.measured["train_flops_per_step"] / 1e12))
            for r in curves
            if r.measured
        ]
        if over:
            out.append(
                _figure(workdir, "flops.png", "TFLOPs of training", f"{name}, validation", over)
            )
    names = {r.slug: r.name for r in found}
    for key, unit, scale, file in (
        ("seconds", "ms of a step of one row", 1e3, "time.png"),
        ("bytes", "MB of a step of one row", 1e-6, "memory.png"),
    ):
        lines = []
        for slug, name in names.items():
            own = [(line["length"], scale * line[key]) for line in lengths if line["row"] == slug]
            if own:
                x, y = zip(*own)
                lines.append((name, x, y, y, y))
        if lines:
            out.append(_figure(workdir, file, "tokens of the row", unit, lines, log=True))
    return out


def _over_seeds(
    r: Result, scale: float
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(step · scale, mean, lowest, highest) of the evaluations that all seeds have."""
    by_step = [dict(curve) for curve in r.curves]
    steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
    values = [[curve[step] for curve in by_step] for step in steps]
    return (
        [scale * step for step in steps],
        [statistics.mean(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )


def _figure(
    workdir: epath.Path,
    file: str,
    x_name: str,
    y_name: str,
    lines: Sequence[tuple[Any, ...]],
    log: bool = False,
) -> str:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, ((name, x, y, low, high), mark) in enumerate(zip(lines, itertools.cycle(MARKS))):
        axes.plot(
            x,
            y,
            label=name,
            marker=mark,
            markersize=4,
            color=f"C{i % 10}",
            linestyle="-" if i < 10 else "--",
        )
        axes.fill_between(x, low, high, alpha=0.15, color=f"C{i % 10}")
    axes.set(xlabel=x_name, ylabel=y_name)
    if log:
        ticks = sorted({n for line in lines for n in line[1]})
        axes.set(xscale="log", yscale="log")
        axes.set_xticks(ticks, labels=[str(n) for n in ticks], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    with (workdir / file).open("wb") as out:
        figure.savefig(out, format="png", dpi=120)
    plt.close(figure)
    return file
