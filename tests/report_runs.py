"""A workdir with metrics and no checkpoints, as reports read it."""

from __future__ import annotations

import json

import numpy as np

from uoe_jax.config import from_dict, to_dict

SMALL = dict(d_model=32, n_layers=2, n_heads=4, d_hidden=64, context_length=32, vocab_size=257)


def write_run(workdir, steps, log_every=1, layers=2, **changes):
    """A workdir as `uoe train` leaves it, without checkpoints."""
    routing = dict(n_experts=8, k=4)
    model = {**SMALL, "n_layers": layers, "n_heads": 8, "smha": routing, "uome": routing, **changes}
    values = {"model": model, "train": {"steps": steps}}
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(from_dict(values))))
    rng = np.random.default_rng(0)
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(log_every, steps + 1, log_every):
            line = {
                "step": step,
                "train/loss": 3 + 5 / step,
                "train/bits_per_byte": 4 + 7 / step,
                "train/grad_norm": float(rng.random()),
            }
            line |= {
                "train/learning_rate": 1e-3,
                "train/tokens": 100,
                "train/skipped": 0,
                "perf/tokens_per_second": 1e4 + step,
                "perf/device_peak_bytes": "n/a",
                "perf/host_peak_bytes": 1 << 30,
            }
            for block in ("smha", "uome"):
                load = np.round(rng.random((layers, 8)) * 2, 4)
                line[f"train/{block}/load"] = load.tolist()
                line[f"train/{block}/kept_by_quarter"] = np.ones((layers, 4)).tolist()
                line |= {
                    f"train/{block}/{name}": [0.5] * layers
                    for name in ("dropped", "untouched", "entropy", "dead", "load_max")
                }
            file.write(json.dumps(line) + "\n")
            if step % (10 * log_every) == 0:
                file.write(
                    json.dumps({"step": step, "eval/loss": 3.5, "eval/bits_per_byte": 5.0}) + "\n"
                )
    return workdir
