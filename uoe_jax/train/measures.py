"""From sums on the device to measures for the user: the task's, and those of routing."""

from typing import Any

import numpy as np

from uoe_jax.config.schema import Config
from uoe_jax.moe.routing import RoutingStats
from uoe_jax.train.task import Sums, task_of


def routing_measures(stats: RoutingStats, k: int, rows: float) -> dict[str, list[Any]]:
    """Per layer (the leading axis of every leaf).

    `dropped`: share of the patches' choices without a slot. `untouched`: share of patches that no
    expert took. `kept_by_quarter`: kept share in each quarter of the row, relative to the mean.
    `load`: share of all choices by expert, times N. `load_max`: its maximum. `dead`: experts that
    nobody chose. `entropy` in nats. `balance`, `z`: losses.
    """
    s = RoutingStats._make(np.asarray(x, np.float64) for x in stats)
    n = s.chosen_N.shape[-1]
    chosen = np.maximum(s.chosen_N.sum(-1), 1)
    patches = np.maximum(s.patches, 1)
    # Where nothing was chosen nothing was dropped.
    kept_share = np.where(s.chosen_N.any(-1), s.kept_N.sum(-1) / chosen, 1.0)
    by_quarter = s.kept_4 / np.maximum(s.chosen_4, 1) / np.maximum(kept_share, 1e-9)[:, None]
    load = n * s.chosen_N / chosen[:, None]
    found: dict[str, Any] = {
        "dropped": 1 - kept_share,
        "untouched": s.untouched / patches,
        "kept_by_quarter": np.where(s.chosen_4 > 0, by_quarter, 1.0),
        "load": load,
        "load_max": load.max(-1),
        "dead": (s.chosen_N == 0).sum(-1),
        "entropy": s.entropy / patches,
        "balance": s.balance / max(rows, 1),
        "z": s.z / max(rows, 1),
    }
    return {name: value.tolist() for name, value in found.items()}


def measures(sums: Sums, config: Config, prefix: str) -> dict[str, Any]:
    """All measures of sums on the host: `<prefix>/loss`, `<prefix>/smha/dropped`, …"""
    found: dict[str, Any] = {**task_of(config).measures(sums, config)}
    routed = config.model.routed()
    for block, stats in sums.routing.items():
        values = routing_measures(stats, routed[block].k, float(sums.rows))
        found |= {f"{block}/{name}": value for name, value in values.items()}
    return {f"{prefix}/{name}": value for name, value in found.items()}
