"""What the root of a ListOps expression gives away: the bar a model must clear to show nesting.

    python -m benchmarks.listops_baseline [--max-length=128 --min-length=10 …]

Prints one JSON line; 2 minutes by default, 1 ms an expression; the options are the keys of
data.listops. The predictor sees only the root's operator and its number of arguments: for each pair
it gives the most frequent value among the training examples, measured on the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

from uoe_jax.config.data import ListopsConfig
from uoe_jax.data.examples import Examples
from uoe_jax.data.sources.listops import CLOSE, OPERATOR, OPERATORS, open_listops

MOST_ARGS = 100  # the highest data.listops.max_args


def root(ids_T: np.ndarray) -> tuple[str, int]:
    """The root's operator and its number of arguments."""
    step_T = (ids_T >= OPERATOR).astype(np.int64) - 2 * (ids_T == CLOSE)  # +1 opens, -1 closes
    depth_T = np.cumsum(step_T)
    begins_T = np.where(step_T == 1, depth_T == 2, (step_T == 0) & (depth_T == 1))
    return OPERATORS[int(ids_T[0]) - OPERATOR][1:], int(begins_T.sum())


def observe(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """int [n] each: the root of every example as one number, and its value."""
    roots, values = [], []
    for i in range(len(examples)):
        (ids_T,), value = examples[i]
        operator, n_args = root(ids_T)
        roots.append(OPERATORS.index(f"[{operator}") * (MOST_ARGS + 1) + n_args)
        values.append(value)
    return np.array(roots), np.array(values)


def measure(c: ListopsConfig) -> dict[str, Any]:
    """Accuracies on the test split: the predictor's, by root operator, the commonest value's."""
    source = open_listops(c)
    roots, values = observe(source.examples("train"))
    counts = np.zeros((len(OPERATORS) * (MOST_ARGS + 1), source.n_classes), np.int64)
    np.add.at(counts, (roots, values), 1)
    commonest = counts.sum(0).argmax()
    guess = np.where(counts.any(1), counts.argmax(1), commonest)
    roots, values = observe(source.examples("test"))
    hits = guess[roots] == values
    operator = roots // (MOST_ARGS + 1)
    of_each = {name[1:]: hits[operator == o] for o, name in enumerate(OPERATORS)}
    return {
        "accuracy": float(hits.mean()),
        "majority": float((values == commonest).mean()),
        "by_operator": {name: float(found.mean()) for name, found in of_each.items() if len(found)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(ListopsConfig):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=field.default, help=field.metadata["doc"])
    c = ListopsConfig(**vars(parser.parse_args()))
    began = time.perf_counter()
    scores = measure(c)
    facts = {**dataclasses.asdict(c), "seconds": round(time.perf_counter() - began, 2)}
    print(json.dumps({"benchmark": "listops_baseline", **scores, **facts}))


if __name__ == "__main__":
    main()
