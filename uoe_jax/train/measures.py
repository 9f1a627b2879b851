"""Sums from the device to the measures a person reads: those of the task, and contract 4's routing measures."""

from __future__ import annotations

from typing import Any

import numpy as np

from uoe_jax.config.schema import Config
from uoe_jax.moe.routing import RoutingStats
from uoe_jax.train.task import Sums, task_of


def routing_measures(stats: RoutingStats, k: int, rows: float) -> dict[str, list[Any]]:
    """Per layer (the leading axis of every leaf).

    `dropped`: share of the patches' choices that got no slot. `untouched`: share of patches no expert took.
    `kept_by_quarter`: kept share in each quarter of the row, relative to the mean. `load`: share of all choices by
    expert, times N. `load_max`: its maximum. `dead`: experts nobody chose. `entropy` in nats. `balance`, `z`: losses.
    """
    s = RoutingStats._make(np.asarray(x, np.float64) for x in stats)
    n = s.chosen_N.shape[-1]
    chosen = np.maximum(s.chosen_N.sum(-1), 1)
    patches = np.maximum(s.patches, 1)
    # Where nothing was chosen nothing was lost.
    kept_share = np.where(s.chosen_N.any(-1), s.kept_N.sum(-1) / chosen, 1.0)
    by_quarter = s.kept_4 / np.maximum(s.chosen_4, 1) / np.maximum(kept_share, 1e-9)[:, None]
    quarter = np.where(s.chosen_4 > 0, by_quarter, 1.0)
    load = n * s.chosen_N / chosen[:, None]
    return {
        "dropped": (1 - kept_share).tolist(),
        "untouched": (s.untouched / patches).tolist(),
        "kept_by_quarter": quarter.tolist(),
        "load": load.tolist(),
        "load_max": load.max(-1).tolist(),
        "dead": (s.chosen_N == 0).sum(-1).tolist(),
        "entropy": (s.entropy / patches).tolist(),
        "balance": (s.balance / max(rows, 1)).tolist(),
        "z": (s.z / max(rows, 1)).tolist(),
    }


def measures(sums: Sums, config: Config, prefix: str) -> dict[str, Any]:
    """All measures of some batches, keys `<prefix>/loss`, …, `<prefix>/smha/dropped`, …; `sums` is on the host."""
    out: dict[str, Any] = {
        f"{prefix}/{name}": value for name, value in task_of(config).measures(sums, config).items()
    }
    routed = config.model.routed()
    for block, stats in sums.routing.items():
        for name, value in routing_measures(stats, routed[block].k, float(sums.rows)).items():
            out[f"{prefix}/{block}/{name}"] = value
    return out
