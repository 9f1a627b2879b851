"""What every benchmark shares: variants measured in turn, what is made of the times, and the machine's own rates.

Times of separate runs cannot be compared on a machine that does other things as well. Variants are measured round by round,
each round in another order, and a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import pathlib
import platform
import time
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from uoe_jax.compare.measure import (
    against as against,
)  # of two variants' rounds; benchmarks read it from here

OUT = pathlib.Path("runs/benchmarks")
Seconds = dict[str, list[float]]  # of every round, by variant
Picture = Callable[[Sequence[Mapping[str, Any]], pathlib.Path], None]


def interleaved(variants: Mapping[str, Callable[[], Any]], rounds: int) -> Seconds:
    """Seconds of every variant in every round; the first round, in which caches are cold, is not counted."""
    out: Seconds = {name: [] for name in variants}
    order = list(variants)
    for _ in range(rounds + 1):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(variants[name]())
            out[name].append(time.perf_counter() - start)
        order = [*order[1:], order[0]]
    return {name: times[1:] for name, times in out.items()}


def keep_memory() -> None:
    """Has glibc keep what is freed; to be called before jax is used. Elsewhere it does nothing.

    Large arrays are given back to the system otherwise, and mapped and zeroed again page by page in the next call: a copy was
    measured at 8 GB/s that has 45 in memory that is at hand, as it is for all layers of a step but the first.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in (
            (-8, 1),
            (-4, 0),
            (-1, -1),
        ):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD: never
            mallopt(option, value)


def matmul(dtype: str) -> tuple[Callable[[], Any], float]:
    """(large matrix products, their operations): the peak that shares of a peak are of.

    Of random numbers: products of equal ones draw less power, and run faster. On an accelerator several in a row, or the time
    it takes to ask for one would be seen.
    """
    n, repeats = (2048, 1) if jax.default_backend() == "cpu" else (8192, 16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype) * n**-0.5

    def product(a: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, repeats, lambda _, b: a @ b, a)

    f = jax.jit(product)
    return lambda: f(a), 2.0 * n**3 * repeats


def dtype() -> str:
    """In which models are measured here."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def copy() -> tuple[Callable[[], Any], float]:
    """(a pass over a large array, the bytes it reads and writes): the bandwidth that rooflines are of."""
    n = 1 << (26 if jax.default_backend() == "cpu" else 29)
    a = jnp.ones((n,), jnp.float32)
    f = jax.jit(lambda a: a + 1)
    return lambda: f(a), 2 * a.nbytes


def arguments(doc: str, **defaults: Any) -> argparse.Namespace:
    """Options of a benchmark: --out, and those given with their defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--out", type=pathlib.Path, default=OUT, help="folder for NAME.json and NAME.png"
    )
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """What a figure must be told with."""
    return {
        "date": datetime.date.today().isoformat(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "backend": jax.default_backend(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def draw(rows: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """A bar for the ratio of every row (or its share of the work) with the quartiles, and a mark where operations would have it."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    key, ideal = (
        ("ratio", "flop_ratio") if any("ratio" in row for row in rows) else ("work_share", "ideal")
    )
    shown = [row for row in rows if key in row]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(shown)), layout="constrained")
    for i, row in enumerate(shown):
        low, high = row.get("ratio_low", row[key]), row.get("ratio_high", row[key])
        axes.barh(
            i,
            row[key],
            color="C0",
            xerr=[[max(0, row[key] - low)], [max(0, high - row[key])]],
            ecolor="0.4",
        )
        axes.plot(row.get(ideal, float("nan")), i, "k|", markersize=10)
    named = [
        "  ".join(
            str(v) for k, v in row.items() if isinstance(v, (str, int)) and k not in ("met", "bars")
        )
        for row in shown
    ]
    axes.set_yticks(range(len(shown)), labels=named, fontsize=8)
    axes.set(xlabel=f"{key}; a stroke: {ideal}", ylim=(len(shown) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def finish(
    name: str,
    out: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    picture: Picture = draw,
    **more: Any,
) -> None:
    """Prints the rows and writes them with the machine to OUT/NAME.json, and their picture to OUT/NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(
        json.dumps({"benchmark": name, "machine": machine(), "rows": list(rows), **more}, indent=1)
        + "\n"
    )
    print(f"{name}: {machine()['cpu']}, jax {jax.__version__}")
    for line in table(rows):
        print(f"  {line}")
    picture(rows, out / f"{name}.png")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as aligned text; a column for every key that some row has."""
    keys = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    cells = [[_shown(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
        for line in (keys, *cells)
    ]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
