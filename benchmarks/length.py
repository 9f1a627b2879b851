"""Time and memory of a train step over the length of its rows, the two figures of the paper: `python -m benchmarks.length`.

As many tokens in every step, from rows of 64 to rows of 4096; 2 layers, D 256, F 1024, H 8, half the experts for every token.
The PNG shows both.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Any, Mapping, Sequence

from benchmarks import timing
from benchmarks.model import PAIR, ROUTED
from uoe_jax.compare.measure import Step
from uoe_jax.config import from_dict
from uoe_jax.costs.flops import train_flops

LENGTHS, TOKENS = (64, 128, 256, 512, 1024, 2048, 4096), 4096
MODEL = dict(
    vocab_size=256, d_model=256, n_layers=2, n_heads=8, d_hidden=1024, smha=ROUTED, uome=ROUTED
)


def main() -> None:
    options = timing.arguments(__doc__, rounds=3)
    dtype = timing.dtype()
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        steps, flops = {}, {}
        for name, (attention, mlp) in PAIR.items():
            model = {
                **MODEL,
                "attention": attention,
                "mlp": mlp,
                "context_length": length,
                "dtype": dtype,
            }
            c = from_dict({"model": model, "train": {"batch_size": TOKENS // length}})
            steps[name], flops[name] = Step(c), train_flops(c.model, TOKENS // length)
        product, operations = timing.matmul(dtype)
        times = timing.interleaved(
            {"peak": product} | {name: step.run for name, step in steps.items()}, options.rounds
        )
        peak = operations / min(times["peak"])
        for name, step in steps.items():
            found = timing.against(times[name], times["dense"])
            row = {
                "length": length,
                "step": name,
                **found,
                "flop_ratio": flops[name] / flops["dense"],
            }
            rows.append(
                row
                | {
                    "of_peak_%": 100 * flops[name] / found["seconds"] / peak,
                    "temp_MB": step.temporary / 1e6,
                }
            )
    at = {(row["step"], row["length"]): row for row in rows}
    growth = {name: at[name, 4096]["seconds"] / at[name, 512]["seconds"] for name in PAIR}
    # 512 and 4096 were not measured at the same time; that UoE grows less, ratios within rounds say.
    met = at["UoE", 4096]["ratio"] < at["UoE", 512]["ratio"]
    timing.finish("length", options.out, rows, draw, growth=growth, met=met)
    print(
        "  time at 4096 over time at 512: "
        + ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
    )


def draw(rows: Sequence[Mapping[str, Any]], file: pathlib.Path) -> None:
    """Time and memory over the length, one line a model."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, unit, scale in zip(
        panels, ("seconds", "temp_MB"), ("ms of a step", "MB of temporary memory"), (1e3, 1)
    ):
        for name, mark in zip(PAIR, itertools.cycle("os^")):
            own = [(row["length"], scale * row[key]) for row in rows if row["step"] == name]
            axes.plot(*zip(*own), label=name, marker=mark)
        axes.set(
            xlabel=f"tokens of a row ({TOKENS} in every step)",
            ylabel=unit,
            xscale="log",
            ylim=(0, None),
        )
        axes.set_xticks(LENGTHS, labels=[str(n) for n in LENGTHS], minor=False)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
