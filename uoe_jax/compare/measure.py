"""Time, memory and FLOPs of a training step of every row of a table, measured in one process.

Times of separate runs cannot be compared on a machine that does other things as well. Here a row's
step and the reference's are measured in turn, round by round: the relative time is the median over
rounds of the ratio within a round. Memory is the compiler's figure for a step on one device.
"""

import collections
import statistics
import sys
import time
from dataclasses import replace
from typing import Any, Sequence

import jax
import numpy as np
from etils import epath

from uoe_jax import runtime_env
from uoe_jax.compare import workspace as files
from uoe_jax.compare.table import numbers
from uoe_jax.config.load import from_dict, to_dict, with_vocabulary
from uoe_jax.config.schema import Config
from uoe_jax.costs.flops import forward_flops_per_token, train_flops
from uoe_jax.costs.memory import idle_parameters, kept_bytes
from uoe_jax.data.pipeline import TrainBatches, default_cache_dir, load
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed import setup
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.models.count import parameters
from uoe_jax.train.step import build
from uoe_jax.train.task import task_of
from uoe_jax.workdir import locate, read_config, write_json

FEWEST_ROUNDS = 5  # of the longest rows, whose steps take long
Configs = dict[str, Config]  # by row
Measured = dict[str, dict[str, float]]  # by row
Refused = tuple[str, int, str]  # row, length, and why it is not measured there


def drawn_batch(config: Config) -> dict[str, np.ndarray]:
    """A training batch without padding, of random tokens or pixels."""
    rng, m = np.random.default_rng(0), config.model
    values, classes = 256 if m.stem == "image" else m.vocab_size, m.classifier.n_classes
    below = dict(tokens=values, targets=values, inputs=values, label=classes, other=classes)
    out = {}
    for name, (shape, dtype) in task_of(config).shapes(config).items():
        if name in below:
            out[name] = rng.integers(0, below[name], shape).astype(dtype)
        elif name == "positions":
            out[name] = np.broadcast_to(np.arange(shape[1], dtype=dtype), shape).copy()
        else:
            out[name] = np.ones(shape, dtype)
    return out


class Step:
    """A compiled training step with its state and batch; `bytes` of a device, with `temporary`."""

    def __init__(self, config: Config) -> None:
        mesh = mesh_lib.make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            program = build(config, mesh)
            self._batch = mesh_lib.put_batch(mesh, drawn_batch(config))
            self._step = program.train_step.lower(program.abstract, self._batch).compile()
            self._state = program.init(jax.random.key(0))
        memory = self._step.memory_analysis()
        assert memory is not None  # CPUs, GPUs and TPUs have it
        self.temporary = memory.temp_size_in_bytes
        self.bytes = memory.argument_size_in_bytes + self.temporary

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        jax.block_until_ready(self.run())
        return time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        """One step; its metrics, on the device."""
        self._state, metrics = self._step(self._state, self._batch)
        return metrics


def against(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The median ratio within a round, the quartiles around it, and the median seconds."""
    ratios = [a / b for a, b in zip(own, reference)]
    low = high = ratios[0]
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    medians = {"seconds": statistics.median(own), "ratio": statistics.median(ratios)}
    return {**medians, "ratio_low": low, "ratio_high": high}


def side_by_side(configs: Configs, reference: str, rounds: int) -> tuple[Measured, list[Refused]]:
    """Step time and memory of every row, measured in turn with the reference, where they fit.

    Two at a time, so that memory need not hold all: seconds are the ratio times the reference's.
    """
    first, failed = Step(configs[reference]), []
    out: Measured = {}
    for name, config in configs.items():
        try:
            step = first if name == reference else Step(config)
            pairs = [(first.seconds(), step.seconds()) for _ in range(rounds + 1)]
            others, own = zip(*pairs[1:])  # the first round warms up
            out[name] = {**against(own, others), "bytes": step.bytes}
        except jax.errors.JaxRuntimeError as error:  # such as too little memory for two models
            if name == reference:
                raise
            why = str(error).partition("\n")[0]
            failed.append((name, config.model.context_length, why))
            runtime_env.notice(f"{name} is not measured: {why}")
    seconds = out[reference]["seconds"]
    for name, found in out.items():
        found["seconds"] = seconds * (1 if name == reference else found["ratio"])
    return out, failed


def batch_lengths(c: Config) -> collections.Counter[int]:
    """{tokens of a row as blocks see it: batches} of the first training batches with seed 0."""
    if c.data.buckets == 1:
        return collections.Counter({c.model.block_length: 1})
    rows = load(c, default_cache_dir()).train
    batches = TrainBatches(rows, c.train.batch_size, seed=0, window=c.data.sort_window)
    in_front = c.model.block_length - c.model.context_length
    n = min(c.train.steps, files.MOST_BATCHES)
    return collections.Counter(batches[i]["inputs"].shape[-1] + in_front for i in range(n))


def counts(config: Config, lengths: collections.Counter[int]) -> dict[str, float]:
    """What is counted from the configuration, and for training from the lengths of its batches."""
    m, batch = config.model, config.train.batch_size
    trained = sum(n * train_flops(m, batch, length) for length, n in lengths.items())
    return {
        "parameters": parameters(m),
        "active_parameters": parameters(m) - idle_parameters(m),
        "forward_flops_per_token": forward_flops_per_token(m),
        "train_flops_per_step": trained / lengths.total(),
        "kept_bytes_per_row": m.n_layers * kept_bytes(replace(m, remat="slots"), 1),
    }


def at_length(config: Config, length: int) -> Config:
    """The same model for one row of another length; ConfigError where its blocks refuse it."""
    values = to_dict(config)
    values["model"]["context_length"] = length
    values["train"].update(batch_size=1, accumulation=1)
    values["eval"].update(batch_size=1)
    values["mesh"].update(replica=1, data=1, fsdp=1, expert=1)
    return from_dict(values)


def trained_rows(workdir: epath.Path, table: dict[str, Any], reference: str) -> Configs:
    """Configurations of the rows that finished or diverged, with the reference's mesh and remat."""
    # Mesh and remat may change between the runs of a table.
    first = read_config(str(files.seed_dir(workdir, reference, 0)))
    configs = {}
    for slug in table["rows"]:
        run = files.seed_dir(workdir, slug, 0)
        c = read_config(str(run)) if (run / "config.json").exists() else None
        if c and (files.is_finished(c, run) or files.diverged(run)):  # others may be unable to run
            c = with_vocabulary(c, c.model.vocab_size or 257)
            model = replace(c.model, remat=first.model.remat)
            configs[slug] = replace(c, mesh=first.mesh, model=model)
    return configs


def measure(workdir_name: str) -> None:
    """Measures the trained rows of a table."""
    workdir = locate(workdir_name)
    table = files.read_table(workdir)
    if table is None:
        remedy = "give the directory of a table made by uoe compare"
        raise UserError(f"--workdir={workdir_name}: holds no table.json; {remedy}")
    names = {slug: row["name"] for slug, row in table["rows"].items()}
    reference = next(slug for slug, name in names.items() if name == table["reference"])
    configs = trained_rows(workdir, table, reference)
    first = configs[reference]
    setup.start(first)
    trained_on = batch_lengths(first)  # early, as it may find no data
    timed, failed = side_by_side(configs, reference, table["rounds"])
    rows = {slug: {**found, **counts(configs[slug], trained_on)} for slug, found in timed.items()}
    lengths = numbers("config.lengths", table["lengths"], int)
    if first.model.stem == "image":  # whose size settles the length
        lengths = ()
    if table["length_rows"]:
        wanted = {*table["length_rows"].split(","), table["reference"]}
        configs = {slug: c for slug, c in configs.items() if names[slug] in wanted}
    swept, refused = [], []
    for length in lengths:
        print(f"   a step of one row of {length} tokens", file=sys.stderr, flush=True)
        own = {}
        for slug, config in configs.items():
            try:
                own[slug] = at_length(config, length)
            except ConfigError as error:
                refused.append((slug, length, str(error)))
        if reference in own:
            rounds = max(FEWEST_ROUNDS, min(table["rounds"], 2048 // length))
            timed, unfit = side_by_side(own, reference, rounds)
            refused += unfit
            swept += [{"row": slug, "length": length, **found} for slug, found in timed.items()]
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    made = {"jax": jax.__version__, "devices": devices, "python": sys.version.split()[0]}
    found = {"made": made, "rows": rows, "lengths": swept, "refused": refused + failed}
    write_json(workdir / files.MEASURED, found)
