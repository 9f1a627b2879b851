"""A trained run, restored for evaluation, generation and export."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

from uoe_jax.config.schema import Config
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import UserError
from uoe_jax.runtime_env import notice
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.step import Params, Program, build


class Restored(NamedTuple):
    """The parameters of a run at one of its checkpoints."""

    program: Program
    params: Params
    step: int


@contextlib.contextmanager
def restored(config: Config, workdir: str, which: str = "latest") -> Iterator[Restored]:
    """Restores a checkpoint (latest, best, or a step) of a run on the configured mesh.

    Changes nothing in the workdir. For `latest`, damaged checkpoints are passed over with a notice.
    """
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh), CheckpointStore(workdir, read_only=True) as store:
        step = _step(store, which)
        program = build(config, mesh)
        abstract = {"params": program.abstract.params}  # the optimizer's state is not read
        if which == "latest" and (newest := store.restore_newest(abstract, notice, partial=True)):
            yield Restored(program, newest[0]["params"], newest[1])
        else:
            yield Restored(program, store.restore(step, abstract, partial=True)["params"], step)


def _step(store: CheckpointStore, which: str) -> int:
    steps = store.steps()
    if not steps:
        raise UserError(f"{store.directory}: holds no complete checkpoint yet; train the run first")
    if which == "latest":
        return steps[-1]
    if which == "best":
        best = store.best_step()
        return steps[-1] if best is None else best
    if which.isdecimal() and int(which) in steps:
        return int(which)
    raise UserError(f"--step={which}: give latest, best, or one of {', '.join(map(str, steps))}")
