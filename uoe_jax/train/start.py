"""What a run begins from: its newest good checkpoint, the parameters of another run, or the initialisation."""

from __future__ import annotations

from typing import Callable

import jax

from uoe_jax.config import Config
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.saved import load_params
from uoe_jax.train.step import Params, Program, TrainState


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
        state = state._replace(params=taken_over(config.train.init_from, program, state.params, say))
    return state, 0, False


def taken_over(source: str, program: Program, own: Params, say: Callable[[str], None]) -> Params:
    """`own` parameters, with those of another run in place of all that have the same name, dtype and shape there."""
    loaded, taken, fresh = load_params(source, program.abstract.params)
    say(f"init_from {source}: {len(taken)} parameters taken, {len(fresh)} fresh")
    for name in taken:
        say(f"  taken {name}")
    for name, reason in fresh.items():
        say(f"  fresh {name}: {reason}")
    return jax.tree.map(lambda theirs, ours: ours if theirs is None else theirs, loaded, own, is_leaf=lambda x: x is None)
