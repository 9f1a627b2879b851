"""Restoring a checkpoint so that no damage goes unnoticed.

Orbax has three faults here: it casts where dtypes differ, restores flipped bits without a word, and
waits in a barrier for a process that has failed. So each process reads its arrays on its own, then
all agree that it worked, and each leaf is compared with its fingerprint.
"""

import logging
import os
from typing import Any, Callable, Mapping, TypeVar, cast

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from uoe_jax.distributed.coordination import RemoteProcessError, on_all, on_process_zero
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train import metadata as metadata_lib
from uoe_jax.train.metadata import STATE, CheckpointDamaged, describe, kind, read_metadata
from uoe_jax.workdir import checkpoint_path, locate

log = logging.getLogger(__name__)
T = TypeVar("T")
Fitting = tuple[Any, list[str], dict[str, str]]
_TREE, _INIT_FROM = "_METADATA", "config.train.init_from"


def restore(path: epath.Path, abstract: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """(State or `partial` state of a checkpoint, its metadata); see CheckpointStore.restore."""
    metadata, expected = read_metadata(path), describe(abstract)
    stored = {n: leaf for n, leaf in metadata["leaves"].items() if n in expected or not partial}
    if not partial and all(name.startswith("params/") for name in stored):
        problem = "holds parameters alone, as an imported model does"
        remedy = f"train them in a new --workdir with --{_INIT_FROM}={path}"
        raise UserError(f"{path}: {problem}; {remedy}")
    if differences := _differences(stored, expected):
        name, found = next(iter(differences.items()))
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        problem = f"this checkpoint does not fit the model: {name} is {found}{more}"
        remedy = "use the configuration it was saved with, or another --workdir"
        raise UserError(f"{path}: {problem}; {remedy}")
    return _load(path, abstract, stored, partial), metadata


def checkpoints_of(path: str | os.PathLike[str]) -> list[epath.Path]:
    """The checkpoints of a workdir, newest first, or the one given; ConfigError for none."""

    def find() -> list[str]:
        root = checkpoint_path(path, _INIT_FROM)
        below = root / "checkpoints"
        if below.is_dir():
            steps = sorted(metadata_lib.list_checkpoints(below), reverse=True)
            return [os.fspath(below / str(step)) for step in steps]
        is_step = root.is_dir() and root.parent.name == "checkpoints"
        return [os.fspath(root)] if is_step or (root / metadata_lib.METADATA).exists() else []

    found = on_process_zero(find)
    if not found:
        remedy = "give the workdir of a run, or one of its checkpoints/<step>"
        raise ConfigError(_INIT_FROM, os.fspath(path), f"there is no checkpoint; {remedy}")
    return [locate(name) for name in found]


def load_params(path: str | os.PathLike[str], abstract_params: Any) -> Fitting:
    """The parameters of another run that fit: same name, dtype and shape. Touches nothing there.

    path: a workdir, whose newest good checkpoint is taken, or one checkpoint. Returns (nested dicts
    like `abstract_params` with None for what does not fit, names of the leaves taken, {name of the
    others: why}). Names are as in the checkpoint, `params/…`. ConfigError where nothing fits.
    """
    paths = checkpoints_of(path)
    for checkpoint in paths:
        try:
            return _params_of(checkpoint, abstract_params, os.fspath(path))
        except CheckpointDamaged as error:
            if len(paths) == 1:
                raise
            log.warning("%s", error)
    problem = f"all of its {len(paths)} checkpoints are damaged; give another run"
    raise ConfigError(_INIT_FROM, os.fspath(path), problem)


def _params_of(path: epath.Path, abstract: Any, given: str) -> Fitting:
    stored, here = read_metadata(path)["leaves"], describe({"params": abstract})
    fresh = {name: why for name, why in _differences(stored, here).items() if name in here}
    taken = [name for name in here if name not in fresh]
    if not taken:
        name, why = next(iter(fresh.items()))
        problem = f"none of its parameters fits the model ({name}: {why})"
        remedy = "give a run of a model that has layers in common"
        raise ConfigError(_INIT_FROM, given, f"{problem}; {remedy}")
    flat = flatten_dict({"params": abstract}, sep="/")
    wanted = unflatten_dict({name: flat[name] for name in taken}, sep="/")
    loaded = flatten_dict(_load(path, wanted, stored, partial=True), sep="/")
    tree = unflatten_dict({name: loaded.get(name) for name in flat}, sep="/")["params"]
    return tree, taken, fresh


def _load(path: epath.Path, abstract: Any, leaves: Mapping[str, Any], partial: bool) -> Any:
    """Reads a tree onto its shardings, and compares it with the fingerprints in `leaves`."""

    def check_there() -> None:
        if not (path / STATE / _TREE).exists():
            raise FileNotFoundError(f"{STATE}/{_TREE} is missing")

    def read() -> Any:
        context = ocp.Context()  # for reading in this process alone: it waits for no other
        context.multiprocessing.primary_host = me = ocp.multihost.process_index()
        context.multiprocessing.active_processes = {me}
        context.pytree.loading.partial_load = partial
        with context, jax.transfer_guard("allow"):
            return ocp.load(path, abstract)

    # Before Orbax counts its operations: if one process is a count behind, the next save hangs.
    _in_each(path, check_there)
    tree = _in_each(path, read)
    # Without its file `_sharding` Orbax returns the data of a typed key instead of the key.
    read_as, words = describe(tree), metadata_lib.fingerprints(tree).words
    wrong = [name for name, word in words.items() if leaves[name]["fingerprint"] != word]
    wrong += [name for name, leaf in read_as.items() if kind(leaf) != kind(leaves[name])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointDamaged(path, f"{wrong[0]}{more} is not as it was saved")
    return tree


def _in_each(path: epath.Path, do: Callable[[], T]) -> T:
    """The result of `do` here, once it worked in all; else CheckpointDamaged or RunError in all."""

    def attempt() -> tuple[T | None, str]:
        try:
            return do(), ""
        except Exception as error:
            metadata_lib.raise_if_transient(path, error)
            return None, f"it cannot be read: {metadata_lib.first_line(error)}"

    def agree() -> None:
        if failure:
            raise RunError(failure)

    value, failure = on_all(attempt)
    try:
        on_all(agree)
    except (RunError, RemoteProcessError) as error:
        raise CheckpointDamaged(path, str(error)) from error
    return cast(T, value)


def _differences(stored: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """Where the leaves that do not fit are, or of which kind, by name."""
    found = {}
    for name in sorted({*stored, *here}):
        if name not in here:
            found[name] = "in the checkpoint and not in the model"
        elif name not in stored:
            found[name] = "in the model and not in the checkpoint"
        elif (there := kind(stored[name])) != kind(here[name]):
            found[name] = f"{there} in the checkpoint and {kind(here[name])} in the model"
    return found
