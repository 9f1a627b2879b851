"""What a device does when there are 1, 2, 4 or 8 of them: `python -m benchmarks.scaling`.

The train step of one model is compiled for so many forced host devices, over `expert`, `data` or `fsdp`; what is counted is
one device's operations and the bytes it sends in a step. Nothing is timed: the devices share the cores of one machine.
"""

from __future__ import annotations

import collections
from typing import Any

from benchmarks import timing
from benchmarks.model import ROUTED
from uoe_jax.config import Config, from_dict
from uoe_jax.plan.compiled import compile_step

# One layer: XLA counts the body of the loop over layers once.
MODEL = dict(
    vocab_size=256,
    d_model=256,
    n_layers=1,
    n_heads=8,
    d_hidden=1024,
    context_length=256,
    smha=ROUTED,
    uome=ROUTED,
)


def config(axis: str, devices: int) -> Config:
    mesh = dict(replica=1, data=1, fsdp=1, expert=1) | {axis: devices}
    return from_dict({"model": MODEL, "train": {"batch_size": 8}, "mesh": mesh})


def main() -> None:
    options = timing.arguments(__doc__)
    one = compile_step(config("data", 1))
    rows: list[dict[str, Any]] = [
        {"axis": "", "devices": 1, "work_share": 1.0, "ideal": 1.0, "temp_MB": one.temporary / 1e6}
    ]
    for axis in ("expert", "data", "fsdp"):
        for devices in (2, 4, 8):
            found = compile_step(config(axis, devices))
            sent = collections.Counter()
            for moved in found.collectives:
                if moved.axes:
                    sent[moved.kind] += moved.sent * moved.times
            row = {
                "axis": axis,
                "devices": devices,
                "work_share": found.flops / one.flops,
                "ideal": 1 / devices,
            }
            row |= {"temp_MB": found.temporary / 1e6, "sent_MB": sum(sent.values()) / 1e6}
            rows.append(row | {f"{kind}_MB": size / 1e6 for kind, size in sent.items()})
    timing.finish("scaling", options.out, rows)


if __name__ == "__main__":
    main()
