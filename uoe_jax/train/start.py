"""What a run begins from: its newest good checkpoint, the parameters of another run, or the initialisation."""

from __future__ import annotations

import os
from typing import Any, Callable, Mapping

import jax
from etils import epath

from uoe_jax.config import Config, leaves
from uoe_jax.data.kept import read_tokenizer
from uoe_jax.data.tokenizer import ByteTokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.processes import by_first
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.saved import load_params
from uoe_jax.train.step import Params, Program, TrainState


def first_state(
    program: Program, store: CheckpointStore, config: Config, say: Callable[[str], None], tokenizer: str | None = None
) -> tuple[TrainState, int, bool]:
    """(state, its step, whether an evaluation of it was interrupted and is still to be done).

    say: shows a line to the person. tokenizer: the fingerprint of this run's; None where it has none.
    """
    found = store.restore_newest(program.abstract, say)
    if found is not None:
        state, step, metadata = found
        return state, step, bool(metadata.get("evaluation_owed"))
    state = program.init(jax.random.key(config.train.seed))
    jax.block_until_ready(state)  # raises where memory is too small; a transfer would wait for ever
    if config.train.init_from:
        state = state._replace(params=taken_over(config, program, state.params, say, tokenizer))
    return state, 0, False


def taken_over(
    config: Config, program: Program, own: Params, say: Callable[[str], None], tokenizer: str | None
) -> Params:
    """`own` parameters, with those of `train.init_from` in place of all that have the same name, dtype and shape there.

    Raises:
      ConfigError: that run has another tokenizer than `tokenizer`, and `train.init_from_any` is false.
    """
    source = config.train.init_from

    def check(place: epath.Path, metadata: Mapping[str, Any]) -> None:
        theirs = by_first(lambda: _tokenizer_of(place, metadata))
        if theirs is None and tokenizer is not None:
            say(f"init_from {source}: its tokenizer is not known; this run's is {tokenizer}")
        elif theirs != tokenizer and not config.train.init_from_any:
            remedy = "give data.tokenizer and data.tokenizer_file of that run, or --config.train.init_from_any=true"
            raise ConfigError("config.train.init_from", source, f"its tokenizer is {theirs}, this run's {tokenizer}; {remedy}")
        elif theirs != tokenizer:
            say(f"init_from {source}: its tokenizer is {theirs}, this run's {tokenizer}")
        before = metadata.get("config", {}).get("model", {})
        for name, value, _ in leaves(config.model):
            found = before
            for part in name.split("."):
                found = found.get(part, {}) if isinstance(found, Mapping) else {}
            if found != {} and found != value and name != "remat":
                say(f"  config.model.{name} is {found!r} there, {value!r} here")

    loaded, taken, fresh = load_params(source, program.abstract.params, check)
    say(f"init_from {source}: {len(taken)} parameters taken, {len(fresh)} fresh")
    for name in taken:
        say(f"  taken {name}")
    for name, reason in fresh.items():
        say(f"  fresh {name}: {reason}")
    return jax.tree.map(lambda theirs, ours: ours if theirs is None else theirs, loaded, own, is_leaf=lambda x: x is None)


def _tokenizer_of(checkpoint: epath.Path, metadata: Mapping[str, Any]) -> str | None:
    """The fingerprint of the tokenizer that a checkpoint was trained with; None where it had none, or that is unknown."""
    if "data" in metadata:
        return metadata["data"].get("tokenizer")
    if metadata.get("config", {}).get("data", {}).get("tokenizer") == "bytes":
        return ByteTokenizer.fingerprint
    kept = read_tokenizer(os.fspath(checkpoint.parent.parent))  # of an imported model
    return kept.fingerprint if kept else None
