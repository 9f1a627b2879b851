"""Time, memory and operations of a training step of every row of a table, measured side by side in one process.

    python -m uoe_jax.compare.measure WORKDIR      after the rows were trained; writes WORKDIR/measured.json

Times of separate runs cannot be compared on a machine that does other things as well. Here a row's step and the reference's
are measured in turn, round by round: the relative time is the median over rounds of the ratio within a round. Memory is
what the compiler needs for the step: arguments and temporary buffers of one device.
"""

from __future__ import annotations

import collections
import statistics
import sys
import time
from dataclasses import replace
from typing import Any, Sequence

import jax
import numpy as np

from uoe_jax import runtime_env
from uoe_jax.compare.run import DAMAGED, diverged, is_finished
from uoe_jax.compare.table import numbers
from uoe_jax.config.schema import Config, from_dict, to_dict, with_vocabulary
from uoe_jax.costs.flops import forward_flops_per_token, train_flops
from uoe_jax.costs.memory import idle_parameters, kept_bytes
from uoe_jax.data.pipeline import TrainBatches, default_cache_dir, load
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import setup
from uoe_jax.errors import EXIT_DONE, ConfigError, UserError
from uoe_jax.models.count import parameters
from uoe_jax.train.step import build
from uoe_jax.train.task import task_of
from uoe_jax.workdir import locate, read_config, read_json, write_json

FEWEST_ROUNDS = 5  # of the longest rows, a step of which takes long
MOST_BATCHES = 256  # whose lengths are looked at


def drawn_batch(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of a train step without padding, of drawn tokens or pixels."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, (shape, dtype) in task_of(config).shapes(config).items():
        if name in ("tokens", "targets", "inputs"):
            out[name] = rng.integers(
                0, 256 if config.model.stem == "image" else config.model.vocab_size, shape
            ).astype(dtype)
        elif name == "positions":
            out[name] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        elif name in ("label", "other"):
            out[name] = rng.integers(0, config.model.classifier.n_classes, shape).astype(np.int32)
        else:  # segments, share; bytes are not asked for
            out[name] = np.ones(shape, dtype)
    return out


class Step:
    """A compiled training step with a state and a batch of its own.

    Attributes:
      temporary, bytes: what the compiler needs between, and with, the arguments of one device.
    """

    def __init__(self, config: Config) -> None:
        mesh = mesh_lib.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            self._batch = mesh_lib.put_batch(mesh, drawn_batch(config))
            self._step = program.train_step.lower(program.abstract, self._batch).compile()
            self._state = program.init(jax.random.key(0))
        found = self._step.memory_analysis()
        assert found is not None  # as on CPUs, GPUs and TPUs
        self.temporary = found.temp_size_in_bytes
        self.bytes = found.argument_size_in_bytes + self.temporary

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        return time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        """One step; its metrics, on the device."""
        self._state, told = self._step(self._state, self._batch)
        return told


def paired(step: Step, reference: Step, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both in every round, one after the other; the first round, in which caches are cold, is not counted.

    Two at a time, so that the memory of a device need not hold all rows.
    """
    found = [(reference.seconds(), step.seconds()) for _ in range(rounds + 1)][1:]
    return [own for _, own in found], [other for other, _ in found]


def against(own: list[float], reference: list[float]) -> dict[str, float]:
    """The median of the ratios within a round, the quartiles around it, and the median seconds."""
    ratios = [a / b for a, b in zip(own, reference)]
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return {
        "seconds": statistics.median(own),
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def side_by_side(
    configs: dict[str, Config], reference: str, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """(time and memory of every row's step, each measured in turn with the reference's; of rows that the device could not run, why).

    Rows are not measured at the same time as each other, so that a row's seconds are its ratio times the reference's.
    """
    first, out, failed = Step(configs[reference]), {}, {}
    for name, config in configs.items():
        try:
            step = first if name == reference else Step(config)
            out[name] = {**against(*paired(step, first, rounds)), "bytes": step.bytes}
        except jax.errors.JaxRuntimeError as error:  # such as too little memory for two models
            if name == reference:
                raise
            failed[name] = str(error).partition("\n")[0]
            print(f"uoe: {name} is not measured: {failed[name]}", file=sys.stderr, flush=True)
    seconds = out[reference]["seconds"]
    return {
        name: {**found, "seconds": seconds * (1 if name == reference else found["ratio"])}
        for name, found in out.items()
    }, failed


def batch_lengths(config: Config) -> collections.Counter[int]:
    """How many training batches, of the first ones with seed 0, have rows of how many tokens as blocks see them; all rows of a
    table see the same batches."""
    c = config
    if c.data.buckets == 1:
        return collections.Counter({c.model.block_length: 1})
    batches = TrainBatches(
        load(c, default_cache_dir()).train, c.train.batch_size, seed=0, window=c.data.sort_window
    )
    in_front = c.model.block_length - c.model.context_length
    return collections.Counter(
        batches[i]["inputs"].shape[-1] + in_front for i in range(min(c.train.steps, MOST_BATCHES))
    )


def counts(config: Config, lengths: collections.Counter[int]) -> dict[str, float]:
    """What is counted from the configuration (`flops`, `memory`), and of training by the lengths of its batches."""
    m = config.model
    trained = sum(
        n * train_flops(m, config.train.batch_size, length) for length, n in lengths.items()
    )
    return {
        "parameters": parameters(m),
        "active_parameters": parameters(m) - idle_parameters(m),
        "forward_flops_per_token": forward_flops_per_token(m),
        "train_flops_per_step": trained / lengths.total(),
        "kept_bytes_per_row": m.n_layers * kept_bytes(replace(m, remat="slots"), 1),
    }


def at_length(config: Config, length: int) -> Config:
    """The same model for one row of another length; ConfigError where the blocks refuse it."""
    values = to_dict(config)
    values["model"]["context_length"] = length
    values["train"].update(batch_size=1, accumulation=1)
    values["eval"].update(batch_size=1)
    values["mesh"].update(replica=1, data=1, fsdp=1, expert=1)
    return from_dict(values)


def over_lengths(
    configs: dict[str, Config], lengths: Sequence[int], reference: str, rounds: int
) -> tuple[list[dict[str, Any]], list[tuple[str, int, str]]]:
    """(time and memory of a step of one row by length, what was not measured at which length and why)."""
    out, refused = [], []
    for length in lengths:
        print(f"   a step of one row of {length} tokens", file=sys.stderr, flush=True)
        own = {}
        for name, config in configs.items():
            try:
                own[name] = at_length(config, length)
            except ConfigError as error:
                refused.append((name, length, str(error)))
        if reference in own:
            timed, failed = side_by_side(
                own, reference, max(FEWEST_ROUNDS, min(rounds, 2048 // length))
            )
            refused += [(name, length, why) for name, why in failed.items()]
            out += [{"row": name, "length": length, **found} for name, found in timed.items()]
    return out, refused


def measure(workdir_name: str) -> int:
    """Measures the rows of a table that were trained; returns the exit code."""
    workdir = locate(workdir_name)
    table = read_json(workdir / "table.json", DAMAGED)
    if table is None:
        raise UserError(
            f"--workdir={workdir_name}: holds no table.json; give the directory of a table made by uoe compare"
        )
    reference = next(
        slug for slug, row in table["rows"].items() if row["name"] == table["reference"]
    )
    configs = {}
    for slug in table["rows"]:
        place = workdir / "rows" / slug / "seed_0"
        if not (place / "config.json").exists():
            continue
        found = read_config(str(place))
        if is_finished(found, place) or diverged(
            place
        ):  # others were left out this time, maybe because they cannot run
            configs[slug] = found if found.model.vocab_size else with_vocabulary(found, 257)
    # What may change while a table is made is the same for all that are compared.
    first = configs[reference]
    configs = {
        slug: replace(c, mesh=first.mesh, model=replace(c.model, remat=first.model.remat))
        for slug, c in configs.items()
    }
    setup.start(first)
    trained_on = batch_lengths(first)  # before all that takes long: it may find no data
    timed_rows, failed = side_by_side(configs, reference, table["rounds"])
    rows = {
        slug: {**timed, **counts(configs[slug], trained_on)} for slug, timed in timed_rows.items()
    }
    image = configs[reference].model.stem == "image"  # whose tokens are settled
    lengths = () if image else numbers("config.lengths", table["lengths"], int)
    wanted = {*table["length_rows"].split(","), table["reference"]}
    swept = {
        slug: c
        for slug, c in configs.items()
        if not table["length_rows"] or table["rows"][slug]["name"] in wanted
    }
    sweep, refused = over_lengths(swept, lengths, reference, table["rounds"])
    refused += [(slug, first.model.context_length, why) for slug, why in failed.items()]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    made = {"jax": jax.__version__, "devices": devices, "python": sys.version.split()[0]}
    write_json(
        workdir / "measured.json",
        {"made": made, "rows": rows, "lengths": sweep, "refused": refused},
    )
    return EXIT_DONE


def main() -> int:
    runtime_env.settle()
    try:
        return measure(sys.argv[1])
    except UserError as error:
        print(f"uoe: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
