"""Checks before and after a save: can the state be stored, and is the checkpoint on the disk whole?

Orbax only warns where it merges nothing, and a file system may lose what it has accepted. Array
data are not read back here: a restore compares their fingerprints.
"""

import collections
import contextlib
import json
import math
import os
import re
import time
from typing import Any, Iterable

import jax
import tensorstore
from etils import epath

from uoe_jax.distributed import coordination
from uoe_jax.errors import RunError, UserError
from uoe_jax.train import metadata as metadata_lib
from uoe_jax.train.metadata import COMMITTED, STATE, leaf_name
from uoe_jax.workdir import SHOWS_UP_S, is_remote

MANIFEST = "manifest.ocdbt"
_ORBAX_FILES = ("_METADATA", "_sharding")  # without them a restore fails, or gives another type
# A key of the manifest: the description of an array, or a chunk of it.
_KEY = re.compile(r"(.*)/(zarr\.json|c(?:/\d+)*)", re.DOTALL)


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
