"""Time, memory and operations of a training step of every row of a table, measured side by side in one process.

    python -m uoe_jax.compare.measure WORKDIR      after the rows were trained; writes WORKDIR/measured.json

Times of separate runs cannot be compared on a machine that does other things as well. Here all steps are compiled first
and then measured in turn, round by round: a row's time relative to the reference's is the median over rounds of the ratio
within a round. Memory is what the compiler needs for the step: arguments and temporary buffers of one device.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax import mesh as mesh_lib
from uoe_jax import runtime
from uoe_jax.config import Config, from_dict, with_vocabulary
from uoe_jax.errors import EXIT_DONE, ConfigError
from uoe_jax.flops import forward_flops, train_flops
from uoe_jax.memory import active_parameters, kept_bytes, parameters
from uoe_jax.train.step import build
from uoe_jax.workdir import locate, write_json


def drawn_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of a train step without padding, of drawn tokens or pixels."""
    rng, shapes = np.random.default_rng(seed), build_shapes(config)
    rows = config.train.batch_size
    out = {}
    for name, (shape, dtype) in shapes.items():
        if name in ("tokens", "targets", "inputs"):
            out[name] = rng.integers(0, 256 if config.model.stem == "image" else config.model.vocab_size, shape).astype(dtype)
        elif name == "positions":
            out[name] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        elif name in ("label", "other"):
            out[name] = rng.integers(0, config.model.classifier.n_classes, shape).astype(np.int32)
        else:  # segments, share; bytes are not asked for
            out[name] = np.ones(shape, dtype)
    assert all(len(a) == rows for a in out.values())
    return out


def build_shapes(config: Config) -> dict[str, Any]:
    from uoe_jax.train.task import task_of

    return task_of(config).shapes(config)


class Step:
    """A compiled training step with a state and a batch of its own."""

    def __init__(self, config: Config) -> None:
        mesh = mesh_lib.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            self._batch = mesh_lib.put_batch(mesh, drawn_batch(config))
            self._step = program.train_step.lower(program.abstract, self._batch).compile()
            self._state = program.init(jax.random.key(0))
        found = self._step.memory_analysis()
        self.bytes = found.argument_size_in_bytes + found.temp_size_in_bytes

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        self._state, told = self._step(self._state, self._batch)
        jax.block_until_ready(told)
        return time.perf_counter() - start


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round; the first round, in which caches are cold, is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            seconds = step.seconds()
            if i:
                found[name].append(seconds)
    return found


def against(seconds: dict[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Of every row: the median of its ratio to the reference within a round, the quartiles around it, and median seconds."""
    out = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference])]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        out[name] = {"seconds": statistics.median(own), "ratio": statistics.median(ratios), "ratio_low": low, "ratio_high": high}
    return out


def counts(config: Config) -> dict[str, float]:
    """What is counted from the configuration (`flops`, `memory`)."""
    m = config.model
    return {
        "parameters": parameters(m),
        "active_parameters": active_parameters(m),
        "forward_flops_per_token": forward_flops(m) / m.rows_per_example / m.context_length,
        "train_flops_per_step": train_flops(m, config.train.batch_size),
        "kept_bytes_per_row": m.n_layers * kept_bytes(dataclasses.replace(m, remat="slots"), 1),
    }


def at_length(config: Config, length: int) -> Config | None:
    """The same model for one row of another length; None where the input settles it, or the blocks refuse it."""
    if config.model.stem == "image":
        return None
    from uoe_jax.config import to_dict

    values = to_dict(config)
    values["model"]["context_length"] = length
    values["train"].update(batch_size=1, accumulation=1)
    values["eval"].update(batch_size=1)
    values["mesh"].update(replica=1, data=1, fsdp=1, expert=1)
    try:
        return from_dict(values)
    except ConfigError:
        return None


def over_lengths(configs: dict[str, Config], lengths: list[int], reference: str, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Time and memory of a step of one row, row by row of the table and length by length."""
    out = []
    for length in lengths:
        say(f"   a step of one row of {length} tokens")
        own = {name: c for name, config in configs.items() if (c := at_length(config, length)) is not None}
        if not own:
            return out
        steps = {name: Step(c) for name, c in own.items()}
        timed = against(interleaved(steps, max(3, min(rounds, 2048 // length))), reference)
        out += [{"row": name, "length": length, "bytes": steps[name].bytes, **timed[name]} for name in steps]
    return out


def measure(workdir_name: str) -> int:
    """Measures the rows of a table that were trained; returns the exit code."""
    workdir = locate(workdir_name)
    table = json.loads((workdir / "table.json").read_text())
    reference = next(slug for slug, row in table["rows"].items() if row["name"] == table["reference"])
    configs = {}
    for slug, row in table["rows"].items():
        known = workdir / "rows" / slug / "seed_0" / "config.json"
        if known.exists():
            found = from_dict(json.loads(known.read_text()))
            configs[slug] = found if found.model.vocab_size else with_vocabulary(found, 257)
    first = configs[reference]
    runtime.start(first)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    steps = {slug: Step(config) for slug, config in configs.items()}
    rows = against(interleaved(steps, table["rounds"]), reference)
    rows = {slug: {**timed, "bytes": steps[slug].bytes, **counts(configs[slug])} for slug, timed in rows.items()}
    del steps
    lengths = [int(n) for n in table["lengths"].split(",") if n]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    made = {"jax": jax.__version__, "devices": devices, "python": sys.version.split()[0], "batch_size": first.train.batch_size}
    sweep = over_lengths(configs, lengths, reference, table["rounds"], say)
    write_json(workdir / "measured.json", {"made": made, "rows": rows, "lengths": sweep})
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(measure(sys.argv[1]))
