"""A whole causal train step, loss and optimizer included, of UoE against the dense model: `python -m benchmarks.model`.

8 layers, D 512, F 2048, H 8, V 256, 4 rows of 1024 tokens; half the experts for every token, in attention, MLP or both. The
dense model computes attention in tiles as UoE does; beside it, the one that holds whole squares of scores. On an accelerator
instead a model of a billion parameters, 8 rows of 4096 tokens, in bfloat16.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax

from benchmarks import timing
from uoe_jax.compare.measure import Step
from uoe_jax.config import Config, from_dict
from uoe_jax.costs.flops import train_flops
from uoe_jax.layers import tiles
from uoe_jax.models.count import parameters

ROUTED = dict(n_experts=8, k=4)
MODEL = dict(
    vocab_size=256,
    d_model=512,
    n_layers=8,
    n_heads=8,
    d_hidden=2048,
    context_length=1024,
    smha=ROUTED,
    uome=ROUTED,
)
BILLION = MODEL | dict(
    vocab_size=32768, d_model=2048, n_layers=18, n_heads=16, d_hidden=8192, context_length=4096
)
PAIR = {"dense": ("dense", "dense"), "UoE": ("smha", "uome")}
BLOCKS = PAIR | {"SMHA only": ("smha", "dense"), "UoME only": ("dense", "uome")}
WHOLE = "dense, whole squares"
TIME, MEMORY = 0.58, 0.65  # bars, of the dense model's
OF_PEAK = (
    40  # bar on an accelerator: % of the product's operations a second, of those the step must do
)


def config(attention: str, mlp: str, dtype: str, rows: int = 4, **changes: Any) -> Config:
    model = {**MODEL, "attention": attention, "mlp": mlp, "dtype": dtype, **changes}
    return from_dict({"model": model, "train": {"batch_size": rows}})


def main() -> None:
    options = timing.arguments(__doc__, rounds=3)
    dtype, on_cpu = timing.dtype(), jax.default_backend() == "cpu"
    sizes: dict[str, Any] = {} if on_cpu else {"rows": 8, **BILLION}
    configs = {
        name: config(*blocks, dtype, **sizes)
        for name, blocks in (BLOCKS if on_cpu else PAIR).items()
    }
    steps = {name: Step(c) for name, c in configs.items()}
    flops = {name: train_flops(c.model, c.train.batch_size) for name, c in configs.items()}
    if on_cpu:
        with mock.patch.object(tiles, "LARGEST", configs["dense"].model.context_length):
            steps[WHOLE], flops[WHOLE] = (
                Step(configs["dense"]),
                train_flops(configs["dense"].model, 4),
            )
    product, operations = timing.matmul(dtype)
    times = timing.interleaved(
        {"peak": product} | {name: step.run for name, step in steps.items()}, options.rounds
    )
    peak, rows = operations / min(times["peak"]), []
    for name, step in steps.items():
        row = {"step": name, **timing.against(times[name], times["dense"])}
        row |= {
            "flop_ratio": flops[name] / flops["dense"],
            "of_peak_%": 100 * flops[name] / row["seconds"] / peak,
        }
        row |= {
            "temp_MB": step.temporary / 1e6,
            "temp_ratio": step.temporary / steps["dense"].temporary,
        }
        if on_cpu:
            row |= {"to_whole_squares": timing.against(times[name], times[WHOLE])["ratio"]}
            row |= {"temp_to_whole_squares": step.temporary / steps[WHOLE].temporary}
        if name == "UoE" and on_cpu:
            row |= {
                "bars": f"{TIME}, {MEMORY}",
                "met": row["ratio"] <= TIME and row["temp_ratio"] <= MEMORY,
            }
        elif name == "UoE":
            row |= {"bars": f"{OF_PEAK} %", "met": row["of_peak_%"] >= OF_PEAK}
        rows.append(row)
    timing.finish(
        "model",
        options.out,
        rows,
        parameters={name: parameters(c.model) for name, c in configs.items()},
    )


if __name__ == "__main__":
    main()
