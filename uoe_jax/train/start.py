"""What a run begins from: its newest good checkpoint, the parameters of another run, or the initialisation."""

from __future__ import annotations

import os
from typing import Any, Callable, Iterator, Mapping

import jax
from etils import epath

from uoe_jax.config.fields import leaves
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.workdir import read_tokenizer
from uoe_jax.distributed.coordination import on_process_zero
from uoe_jax.errors import ConfigError
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.saved import CheckpointDamaged, checkpoints_of, load_params, read_metadata
from uoe_jax.train.step import Params, Program, TrainState
from uoe_jax.workdir import locate


def first_state(
    program: Program, store: CheckpointStore, config: Config, say: Callable[[str], None]
) -> tuple[TrainState, int, bool]:
    """(state, its step, whether an evaluation of it was interrupted and is still to be done).

    say: shows a line to the person.
    """
    found = store.restore_newest(program.abstract, say)
    if found is not None:
        state, step, metadata = found
        return state, step, bool(metadata.get("evaluation_owed"))
    state = program.init(jax.random.key(config.train.seed))
    jax.block_until_ready(state)  # raises where memory is too small; a transfer would wait for ever
    if config.train.init_from:
        state = state._replace(
            params=taken_over(config.train.init_from, program, state.params, say)
        )
    return state, 0, False


def taken_over(source: str, program: Program, own: Params, say: Callable[[str], None]) -> Params:
    """`own` parameters, with those of another run in place of all that have the same name, dtype and shape there."""
    loaded, taken, fresh = load_params(source, program.abstract.params)
    say(f"init_from {source}: {len(taken)} parameters taken, {len(fresh)} fresh")
    for name in taken:
        say(f"  taken {name}")
    for name, reason in fresh.items():
        say(f"  fresh {name}: {reason}")
    return jax.tree.map(
        lambda theirs, ours: ours if theirs is None else theirs,
        loaded,
        own,
        is_leaf=lambda x: x is None,
    )


def check_init_from(config: Config, tokenizer: str | None, say: Callable[[str], None]) -> None:
    """Compares the run of `train.init_from` with this one before anything is written, and says which keys differ.

    tokenizer: the fingerprint of this run's; None where it has none.

    Raises:
      ConfigError: there is no such run, or it has another tokenizer and `train.init_from_any` is false.
    """
    source = config.train.init_from
    for place in map(locate, checkpoints_of(source)):
        try:
            metadata = read_metadata(place)
        except CheckpointDamaged:
            continue  # as `load_params` does
        theirs = on_process_zero(lambda: _tokenizer_of(place, metadata))
        if theirs != tokenizer:
            said = f"its tokenizer is {theirs or 'unknown'}, this run's is {tokenizer}"
            if theirs is not None and not config.train.init_from_any:
                remedy = "give data.tokenizer and data.tokenizer_file of that run, or --config.train.init_from_any=true"
                raise ConfigError("config.train.init_from", source, f"{said}; {remedy}")
            say(f"init_from {source}: {said}")
        for key, found, value in _other_keys(
            metadata.get("config", {}).get("model", {}), config.model
        ):
            say(f"init_from {source}: config.model.{key} is {found!r} there, {value!r} here")
        return


def _other_keys(before: Mapping[str, Any], model: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of the keys of a model that differ and that both versions know."""
    for key, value, meta in leaves(model):
        *sections, last = key.split(".")
        found: Any = before
        for part in sections:
            found = found.get(part, {})
        if not meta["free"] and last in found and found[last] != value:
            yield key, found[last], value


def _tokenizer_of(checkpoint: epath.Path, metadata: Mapping[str, Any]) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint was trained with; None where it had none, or that is unknown."""
    if "data" in metadata:
        return metadata["data"].get("tokenizer")
    if metadata.get("config", {}).get("data", {}).get("tokenizer") == "bytes":
        return ByteTokenizer.fingerprint
    kept = read_tokenizer(os.fspath(checkpoint.parent.parent))  # of an imported model
    return kept.fingerprint if kept else None
