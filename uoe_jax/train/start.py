"""What a run starts from: its newest good checkpoint, another run's parameters, or new ones."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from uoe_jax.config.fields import leaves
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.load import read_tokenizer
from uoe_jax.distributed.coordination import on_process_zero
from uoe_jax.errors import ConfigError
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.metadata import CheckpointDamaged, read_metadata
from uoe_jax.train.saved import checkpoints_of, load_params
from uoe_jax.train.step import Params, Program, TrainState
from uoe_jax.workdir import locate

Notice = Callable[[str], None]  # prints a line for the user


def first_state(
    program: Program, store: CheckpointStore, config: Config, notice: Notice
) -> tuple[TrainState, int, bool]:
    """(State, its step, whether its evaluation was interrupted and is still to be done)."""
    found = store.restore_newest(program.abstract, notice)
    if found is not None:
        state, step, metadata = found
        return state, step, bool(metadata.get("evaluation_owed"))
    state = program.init(jax.random.key(config.train.seed))
    jax.block_until_ready(state)  # raises where memory is too small; a transfer would hang
    if source := config.train.init_from:
        state = state._replace(params=merged_params(source, program, state.params, notice))
    return state, 0, False


def merged_params(source: str, program: Program, own: Params, notice: Notice) -> Params:
    """`own` parameters, replaced by another run's where name, dtype and shape are the same."""
    loaded, taken, fresh = load_params(source, program.abstract.params)
    notice(f"init_from {source}: {len(taken)} parameters taken, {len(fresh)} fresh")
    for name in taken:
        notice(f"  taken {name}")
    for name, reason in fresh.items():
        notice(f"  fresh {name}: {reason}")
    either = lambda theirs, ours: ours if theirs is None else theirs  # noqa: E731
    return jax.tree.map(either, loaded, own, is_leaf=lambda x: x is None)


def check_init_from(config: Config, tokenizer: str | None, notice: Notice) -> None:
    """Compares the run of `train.init_from` with this one, before anything is written.

    ConfigError for no such run, or another tokenizer if `train.init_from_any` is false. tokenizer:
    the fingerprint of this run's; None where it has none.
    """
    source = config.train.init_from
    for path in map(locate, checkpoints_of(source)):
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
        theirs = metadata.get("config", {}).get("model", {})
        for key, found, value in _other_keys(theirs, config.model):
            notice(f"init_from {source}: config.model.{key} is {found!r} there, {value!r} here")
        return


def _other_keys(before: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of a model's keys that differ and that both versions know."""
    for key, value, meta in leaves(model):
        *sections, last = key.split(".")
        found: Any = before
        for section in sections:
            found = found.get(section, {})
        if not meta["free"] and last in found and found[last] != value:
            yield key, found[last], value


def _tokenizer_of(checkpoint: epath.Path, metadata: Mapping[str, Any]) -> str | None:
    """The fingerprint of a checkpoint's tokenizer; None where it had none, or it is unknown."""
    if "data" in metadata:
        return metadata["data"].get("tokenizer")
    if metadata.get("config", {}).get("data", {}).get("tokenizer") == "bytes":
        return ByteTokenizer.fingerprint
    kept = read_tokenizer(os.fspath(checkpoint.parent.parent))  # of an imported model
    return kept.fingerprint if kept else None
