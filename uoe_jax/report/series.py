"""What a run logged, downsampled for drawing: means over intervals of steps, with their ranges."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.config.schema import Config
from uoe_jax.train.metrics import read_metrics

POINTS = 1200  # of a curve: more than a screen is wide
CELLS = 160_000  # of all heat maps of a run
PER_LAYER = {  # measures of a routed block that are one number a layer, and their names in the page
    "dropped": "choices without a slot",
    "untouched": "patches no expert took",
    "entropy": "router entropy, nats",
    "dead": "dead experts",
    "load_max": "highest load / mean",
}


class Curve(NamedTuple):
    """One measure over a run: float64 [T] each."""

    step: np.ndarray
    tokens: np.ndarray  # seen so far; a logged step stands for those since the last
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Routing(NamedTuple):
    """How a block routed during training, in T intervals of steps."""

    edges: np.ndarray  # float64 [T+1], the steps at which intervals begin and end
    load: np.ndarray  # float32 [layers,T,N], share of the choices by expert, times N
    quarters: np.ndarray  # float32 [layers,T,4], kept share by quarter of the row
    lines: dict[str, np.ndarray]  # the measures of `PER_LAYER`, float32 [layers,T] each


class RunLog(NamedTuple):
    """What a run's workdir holds."""

    name: str
    config: Config
    step: int
    curves: dict[str, Curve]  # by key of metrics.jsonl
    routing: dict[str, Routing]  # by block
    last: dict[str, dict[str, Any]]  # the newest line by evaluated split


def read_log(workdir: str, config: Config, name: str, points: int = POINTS) -> RunLog:
    """Reads a run, finished or not. Raises UserError where its metrics cannot be read."""
    lines = read_metrics(workdir)
    train = [line for line in lines if "train/loss" in line]
    steps = np.array([line["step"] for line in train], np.float64)
    seen = np.cumsum([line["train/tokens"] for line in train] * np.diff(steps, prepend=0))
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(key, []).append((line["step"], value))
    curves = {key: _curve(found[key], steps, seen, points) for key in sorted(found)}
    blocks = config.model.routed() if train else ()
    routing = {b: _routing(train, b, config) for b in blocks if f"train/{b}/load" in train[0]}
    last = {split: line for line in lines for split in ("eval", "test") if f"{split}/loss" in line}
    step = max((line["step"] for line in lines), default=0)
    return RunLog(name, config, step, curves, routing, last)


def names(workdirs: Sequence[str]) -> list[str]:
    """Short distinct names of runs: as many last parts of their directories as that takes."""
    parts = [(w if "://" in w else os.path.abspath(w)).rstrip("/").split("/") for w in workdirs]
    for n in range(1, max(map(len, parts)) + 1):
        short = ["/".join(p[-n:]) for p in parts]
        if len(set(short)) == len(short):
            return short
    return [f"{name} ({i})" for i, name in enumerate(short)]


def _curve(found: list[Any], logged: np.ndarray, seen: np.ndarray, points: int) -> Curve:
    step, value = np.array(found, np.float64).T
    tokens = np.interp(step, np.append(0, logged), np.append(0, seen))
    starts = _starts(len(step), points)
    sizes = np.diff(starts, append=len(step))
    at, seen_at, mean = (np.add.reduceat(x, starts) / sizes for x in (step, tokens, value))
    low, high = np.minimum.reduceat(value, starts), np.maximum.reduceat(value, starts)
    return Curve(at, seen_at, mean, low, high)


def _starts(n: int, most: int) -> np.ndarray:
    """Where at most `most` intervals of n readings begin."""
    return np.arange(min(n, most)) * n // min(n, most)


def _routing(train: Sequence[dict[str, Any]], block: str, config: Config) -> Routing:
    layers, n = config.model.n_layers, config.model.routed()[block].n_experts
    most = max(20, CELLS // (layers * n * len(config.model.routed())))
    starts = _starts(len(train), min(most, 200))
    steps = np.array([line["step"] for line in train], np.float64)

    def means(name: str, *shape: int) -> np.ndarray:
        """float32 [layers,T,…]: over the finite values of each interval."""
        values = np.array([line[f"train/{block}/{name}"] for line in train], np.float64)
        values = values.reshape(len(train), layers, *shape)
        finite = np.isfinite(values)
        total = np.add.reduceat(np.where(finite, values, 0), starts, axis=0)
        count = np.add.reduceat(finite, starts, axis=0, dtype=np.int64)
        return np.moveaxis(total / np.maximum(count, 1), 0, 1).astype(np.float32)

    end = steps[-1] + max(1.0, (steps[-1] - steps[0]) / max(len(steps) - 1, 1))
    lines = {name: means(name) for name in PER_LAYER}
    edges = np.append(steps[starts], end)
    return Routing(edges, means("load", n), means("kept_by_quarter", 4), lines)
