"""What a run starts from, and a trained run restored for evaluation, generation and export."""

import contextlib
import os
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import jax
from etils import epath
from flax.traverse_util import flatten_dict

from uoe_jax.config.fields import leaves
from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.load import read_tokenizer
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.coordination import on_process_zero
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.runtime_env import notice
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.metadata import CheckpointDamaged, read_metadata
from uoe_jax.train.saved import checkpoints_of, load_params
from uoe_jax.train.step import Params, Program, TrainState, build


def first_state(
    program: Program, store: CheckpointStore, config: Config, notice: Callable[[str], None]
) -> tuple[TrainState, int, bool]:
    """(State, its step, whether its evaluation was interrupted and is still to be done)."""
    found = store.restore_newest(program.abstract, notice)
    if found is not None:
        state, step, metadata = found
        return state, step, bool(metadata.get("evaluation_owed"))
    state = program.init(jax.random.key(config.train.seed))
    jax.block_until_ready(state)  # raises where memory is too small; a transfer would hang
    if source := config.train.init_from:
        loaded, taken, fresh = load_params(source, program.abstract.params)
        notice(f"init_from {source}: {len(taken)} parameters taken, {len(fresh)} fresh")
        for name in taken:
            notice(f"  taken {name}")
        for name, reason in fresh.items():
            notice(f"  fresh {name}: {reason}")
        either = lambda theirs, ours: ours if theirs is None else theirs  # noqa: E731
        merged = jax.tree.map(either, loaded, state.params, is_leaf=lambda x: x is None)
        state = state._replace(params=merged)
    return state, 0, False


def check_init_from(config: Config, tokenizer: str | None, notice: Callable[[str], None]) -> None:
    """Compares the run of `train.init_from` with this one, before anything is written."""
    source = config.train.init_from
    for path in checkpoints_of(source):
        try:
            metadata = read_metadata(path)
        except CheckpointDamaged:
            continue  # as `load_params` does
        theirs = on_process_zero(lambda: _tokenizer_of(path, metadata))
        if theirs != tokenizer:
            problem = f"its tokenizer is {theirs or 'unknown'}, this run's is {tokenizer}"
            if theirs is not None and not config.train.init_from_any:
                remedy = "give data.tokenizer and data.tokenizer_file of that run"
                problem = f"{problem}; {remedy}, or --config.train.init_from_any=true"
                raise ConfigError("config.train.init_from", source, problem)
            notice(f"init_from {source}: {problem}")
        before = flatten_dict(metadata.get("config", {}).get("model", {}), sep=".")
        for key, value, meta in leaves(config.model):
            found = before.get(key, value)  # both versions may not know the same keys
            if not meta["free"] and found != value:
                there = f"config.model.{key} is {found!r} there, {value!r} here"
                notice(f"init_from {source}: {there}")
        return


def _tokenizer_of(checkpoint: epath.Path, metadata: Mapping[str, Any]) -> str | None:
    """The fingerprint of a checkpoint's tokenizer; None where it had none, or it is unknown."""
    if "data" in metadata:
        return metadata["data"].get("tokenizer")
    if metadata.get("config", {}).get("data", {}).get("tokenizer") == "bytes":
        return ByteTokenizer.fingerprint
    kept = read_tokenizer(os.fspath(checkpoint.parent.parent))  # of an imported model
    return kept.fingerprint if kept else None


class Restored(NamedTuple):
    """The parameters of a run at one of its checkpoints."""

    program: Program
    params: Params
    step: int


@contextlib.contextmanager
def restored(config: Config, workdir: str, which: str = "latest") -> Iterator[Restored]:
    """The checkpoint `which` (latest, best, or a step) of a run, on the configured mesh.

    Changes nothing in the workdir. For `latest`, damaged checkpoints are passed over with a notice.
    """
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh), CheckpointStore(workdir, read_only=True) as store:
        step = _step(store, which)
        program = build(config, mesh)
        abstract = {"params": program.abstract.params}  # the optimizer's state is not read
        if which == "latest" and (newest := store.restore_newest(abstract, notice, partial=True)):
            state, step, _ = newest
        else:
            state = store.restore(step, abstract, partial=True)
        yield Restored(program, state["params"], step)


def _step(store: CheckpointStore, which: str) -> int:
    if not (steps := store.steps()):
        raise UserError(f"{store.directory}: holds no complete checkpoint yet; train the run first")
    if which in ("latest", "best"):
        best = store.best_step() if which == "best" else None
        return steps[-1] if best is None else best
    if which.isdecimal() and int(which) in steps:
        return int(which)
    raise UserError(f"--step={which}: give latest, best, or one of {', '.join(map(str, steps))}")
