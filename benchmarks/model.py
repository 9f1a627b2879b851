"""A whole causal train step, loss and optimizer included, of UoE against the dense model: `python -m benchmarks.model`.

8 layers, D 512, F 2048, H 8, V 256, 4 rows of 1024 tokens; half the experts for every token, in attention, MLP or both. The
dense model computes attention in tiles as UoE does; beside it, the one that holds whole squares of scores.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

from benchmarks import timing
from uoe_jax import tiles
from uoe_jax.compare.measure import Step
from uoe_jax.config import Config, from_dict
from uoe_jax.flops import train_flops

ROUTED = dict(n_experts=8, k=4)
MODEL = dict(vocab_size=256, d_model=512, n_layers=8, n_heads=8, d_hidden=2048, context_length=1024, smha=ROUTED, uome=ROUTED)
PAIR = {"dense": ("dense", "dense"), "UoE": ("smha", "uome")}
BLOCKS = PAIR | {"SMHA only": ("smha", "dense"), "UoME only": ("dense", "uome")}
WHOLE = "dense, whole squares"
TIME, MEMORY = 0.58, 0.65  # bars, of the dense model's


def config(attention: str, mlp: str, dtype: str, **changes: Any) -> Config:
    model = {**MODEL, "attention": attention, "mlp": mlp, "dtype": dtype, **changes}
    return from_dict({"model": model, "train": {"batch_size": 4}})


def main() -> None:
    options = timing.arguments(__doc__, rounds=3)
    dtype = timing.dtype()
    configs = {name: config(*blocks, dtype) for name, blocks in BLOCKS.items()}
    steps = {name: Step(c) for name, c in configs.items()}
    with mock.patch.object(tiles, "LARGEST", configs["dense"].model.context_length):
        steps[WHOLE], whole_flops = Step(configs["dense"]), train_flops(configs["dense"].model, 4)
    product, operations = timing.matmul(dtype)
    times = timing.interleaved({"peak": product} | {name: step.run for name, step in steps.items()}, options.rounds)
    peak, rows = operations / min(times["peak"]), []
    for name, step in steps.items():
        flops = whole_flops if name == WHOLE else train_flops(configs[name].model, 4)
        row = {"step": name, **timing.against(times[name], times["dense"])}
        row |= {"flop_ratio": flops / train_flops(configs["dense"].model, 4), "of_peak_%": 100 * flops / row["seconds"] / peak}
        row |= {"temp_MB": step.temporary / 1e6, "temp_ratio": step.temporary / steps["dense"].temporary}
        row |= {"to_whole_squares": timing.against(times[name], times[WHOLE])["ratio"]}
        row |= {"temp_to_whole_squares": step.temporary / steps[WHOLE].temporary}
        if name == "UoE":
            row |= {"bars": f"{TIME}, {MEMORY}", "met": row["ratio"] <= TIME and row["temp_ratio"] <= MEMORY}
        rows.append(row)
    timing.finish("model", options.out, rows)


if __name__ == "__main__":
    main()
