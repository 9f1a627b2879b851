"""Checks that no damage to a checkpoint goes unnoticed: before and after a save, and at a restore.

Orbax only warns where it merges nothing, and a file system may lose what it has accepted. When it
restores, Orbax casts where dtypes differ, returns flipped bits without a word, and waits in a
barrier for a process that has failed. So each process reads its arrays on its own, then all agree
that it worked, and each leaf is compared with its fingerprint.
"""

import collections
import contextlib
import json
import logging
import math
import os
import re
import time
from typing import Any, Callable, Iterable, Mapping, TypeVar, cast

import jax
import tensorstore
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from uoe_jax.distributed import coordination
from uoe_jax.distributed.coordination import RemoteProcessError, on_all, on_process_zero
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train import metadata as metadata_lib
from uoe_jax.train.metadata import COMMITTED, STATE, CheckpointDamaged, describe, kind, leaf_name
from uoe_jax.workdir import SHOWS_UP_S, checkpoint_path, is_remote, locate

log = logging.getLogger(__name__)
T = TypeVar("T")
Fitting = tuple[Any, list[str], dict[str, str]]
_TREE, _INIT_FROM = "_METADATA", "config.train.init_from"
MANIFEST = "manifest.ocdbt"
_ORBAX_FILES = ("_METADATA", "_sharding")  # without them a restore fails, or gives another type
# A key of the manifest: the description of an array, or a chunk of it.
_KEY = re.compile(r"(.*)/(zarr\.json|c(?:/\d+)*)", re.DOTALL)


def restore(path: epath.Path, abstract: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """(State or `partial` state of a checkpoint, its metadata); see CheckpointStore.restore."""
    metadata, expected = metadata_lib.read_metadata(path), describe(abstract)
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
    stored, here = metadata_lib.read_metadata(path)["leaves"], describe({"params": abstract})
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


def check_storable(state: Any) -> int:
    """Refuses what Orbax would refuse too late or not restore; returns the bytes of the state."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{leaf_name(path)}: must be a jax.Array, not {type(leaf).__name__}")
        if leaf.size == 0:
            remedy = "the configuration must not make one (no layers, no experts)"
            problem = f"has shape {leaf.shape}: an array of size 0 cannot be saved"
            raise UserError(f"{leaf_name(path)} {problem}; {remedy}")
        total += leaf.size * leaf.dtype.itemsize
    return total


def check(path: epath.Path, damaged: epath.Path, latest: int | None) -> None:
    """Moves a checkpoint that is not whole into `damaged` and raises RunError; in process 0."""
    if not (reason := fault(path)):
        return
    moved = ""
    with contextlib.suppress(RunError):  # perhaps the directory is gone
        moved = f"; it was moved to {metadata_lib.quarantine(path, damaged)}"
    remedy = "run the same command again"
    if latest is not None:
        remedy += f" (it resumes from step {latest})"
    elif moved:
        remedy = f"move {damaged} away and {remedy}, which then starts from the beginning"
    problem = f"this checkpoint was written and is not whole ({reason}){moved}"
    raise RunError(f"{path}: {problem}; fix that and {remedy}")


def fault(path: epath.Path) -> str:
    """What is wrong with the checkpoint at `path`, "" for nothing; called in process 0.

    Its metadata must be as they were written, the manifest must list every leaf with all of its
    chunks and what each process wrote, and the data files must be there and long enough.
    """
    # What other machines wrote may show up late on a network file system.
    deadline = time.monotonic() + (SHOWS_UP_S if coordination.are_several() else 0)
    while True:
        try:
            found = _fault(path)
        except RunError:
            raise
        except Exception as error:
            metadata_lib.raise_if_transient(path, error)
            found = metadata_lib.first_line(error)
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(0.2)


def _fault(path: epath.Path) -> str:
    metadata = metadata_lib.metadata_or_fault(path)
    state: epath.Path = path / STATE
    if isinstance(metadata, str):
        return metadata
    if is_remote(path) and not (path / COMMITTED).exists():
        return f"{COMMITTED} is missing"
    for file in (*(state / name for name in _ORBAX_FILES), *(state / "array_metadatas").iterdir()):
        if not json.loads(file.read_bytes()):
            return f"{file.name} is empty"
    if not (state / MANIFEST).exists():
        return f"{STATE}/{MANIFEST} is missing: what the processes wrote was not merged"
    entries = _entries(state)
    # A process that had nothing to write has no manifest.
    for manifest in state.glob(f"ocdbt.process_*/{MANIFEST}"):
        process = manifest.parent
        if lost := sorted(_entries(process).keys() - entries.keys()):
            return f"{lost[0]} of {process.name} is missing in {STATE}/{MANIFEST}"
    return _missing_chunks(metadata["leaves"], state, entries) or _short_file(state, entries)


def _dump(directory: epath.Path, node: str | None = None) -> Any:
    """The manifest of a directory, or a node that it points to."""
    # Not as a URL, in which some characters have a meaning.
    spec, name = {"driver": "file", "path": f"{os.fspath(directory)}/"}, os.fspath(directory)
    if is_remote(name):
        bucket, _, rest = name.removeprefix("gs://").partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}
    store = tensorstore.KvStore.open(spec).result()
    return tensorstore.ocdbt.dump(store, node).result()


def _entries(directory: epath.Path) -> dict[str, Any]:
    """All entries, by key, of the newest version of the manifest of a directory."""
    found: dict[str, Any] = {}
    versions = _dump(directory)["versions"][-1:]
    nodes: list[tuple[Any, bytes]] = [(v["root"].get("location"), b"") for v in versions]
    while nodes:
        location, prefix = nodes.pop()
        node: Any = _dump(directory, location) if location else {"height": 0, "entries": []}
        for entry in node["entries"]:
            if node["height"]:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            else:
                found[(prefix + entry["key"]).decode()] = entry
    return found


def _missing_chunks(leaves: Iterable[str], state: epath.Path, entries: dict[str, Any]) -> str:
    """Which leaf the manifest lacks, or has not whole."""
    described: dict[str, Any] = {}
    chunks: collections.Counter[str] = collections.Counter()
    for key, entry in entries.items():
        if match := _KEY.fullmatch(key):
            name = match[1].replace("/", ".")  # Orbax joins the parts of a leaf's name by dots
            if match[2] == "zarr.json":
                value = entry.get("inline_value") or _dump(state, entry["indirect_value"])
                described[name] = json.loads(value)
            else:
                chunks[name] += 1
    for leaf in leaves:
        name = leaf.replace("/", ".")
        if name not in described:
            return f"{leaf} is missing in {STATE}/{MANIFEST}"
        sizes = described[name]["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [-(-n // size) for n, size in zip(described[name]["shape"], sizes, strict=True)]
        if (expected := math.prod(counts)) != chunks[name]:
            return f"{chunks[name]} of {expected} chunks of {leaf} are in {STATE}/{MANIFEST}"
    return ""


def _short_file(state: epath.Path, entries: dict[str, Any]) -> str:
    """Which data file is missing, or shorter than the manifest says."""
    lengths: collections.Counter[str] = collections.Counter()
    for entry in entries.values():
        if place := entry.get("indirect_value"):
            _, root, name, start, size = place.split(":")
            lengths[root + name] = max(lengths[root + name], int(start) + int(size))
    for file, length in lengths.items():
        path = state / file
        if not path.exists():
            return f"{STATE}/{file} is missing"
        if (size := path.stat().length) < length:
            return f"{STATE}/{file} has {size:,} bytes of at least {length:,}"
    return ""
