"""Whether a state can be stored, and whether the checkpoint of it that was just written is on the disk, whole.

Orbax only warns where it merges nothing, and a file system may lose what it has taken. Array data are not read back here:
their fingerprints are, at a restore.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from typing import Any, Mapping

import jax
import tensorstore
from etils import epath

from uoe_jax.distributed import coordination
from uoe_jax.errors import RunError, UserError
from uoe_jax.train import saved
from uoe_jax.train.fingerprint import leaf_name
from uoe_jax.workdir import SHOWS_UP_S, is_remote

MANIFEST = "manifest.ocdbt"
_BESIDE = (
    "_METADATA",
    "_sharding",
)  # of Orbax: without them a restore fails, or gives another type
_KEY = re.compile(
    r"(.*)/(zarr\.json|c(?:/\d+)*)", re.DOTALL
)  # in the manifest: the description of an array, or a chunk


def check_storable(state: Any) -> int:
    """Refuses what Orbax would refuse too late or not restore; returns the bytes of the whole state, all hosts."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{leaf_name(path)}: must be a jax.Array, not {type(leaf).__name__}")
        if leaf.size == 0:
            raise UserError(
                f"{leaf_name(path)} has shape {leaf.shape}: an array of size 0 cannot be saved; "
                "the configuration must not make one (no layers, no experts)"
            )
        total += leaf.size * leaf.dtype.itemsize
    return total


def check(path: epath.Path, aside: epath.Path, latest: int | None) -> None:
    """Lets a checkpoint pass that is whole; moves any other below `aside`, so that nobody resumes from it. In process 0.

    latest: the newest checkpoint that did pass, for the person.

    Raises:
      RunError: it is not whole, or cannot be read now.
    """
    if not (reason := fault(path)):
        return
    moved = ""
    with contextlib.suppress(RunError):  # the directory is gone, perhaps
        moved = f"; it was moved to {saved.move_aside(path, aside)}"
    remedy = "run the same command again" + (
        f" (it resumes from step {latest})" if latest is not None else ""
    )
    if latest is None and moved:
        remedy = f"move {aside} away and {remedy}, which then starts from the beginning"
    raise RunError(
        f"{path}: this checkpoint was written and is not whole ({reason}){moved}; fix that and {remedy}"
    )


def fault(path: epath.Path) -> str:
    """What is wrong with the checkpoint at `path`, "" where nothing is; to be called in process 0.

    Its metadata must be as they were written, the manifest must list every leaf with all of its chunks and what each
    process wrote, and the data files that it names must be there and long enough. Takes some milliseconds, as no array
    data are read.

    Raises:
      RunError: it cannot be read now (rights, memory, the network).
    """
    # What other machines wrote may show up late on a network file system.
    until = time.monotonic() + (SHOWS_UP_S if coordination.are_several() else 0)
    while True:
        try:
            found = _fault(path)
        except RunError:
            raise
        except Exception as error:
            saved.raise_if_passing(path, error)
            found = saved.first_line(error)
        if not found or time.monotonic() >= until:
            return found
        time.sleep(0.2)


def _fault(path: epath.Path) -> str:
    metadata = saved.metadata_or_fault(path)
    state: epath.Path = path / saved.STATE
    if isinstance(metadata, str):
        return metadata
    if is_remote(path) and not (path / saved.COMMITTED).exists():
        return f"{saved.COMMITTED} is missing"
    for file in (*(state / name for name in _BESIDE), *(state / "array_metadatas").iterdir()):
        if not json.loads(file.read_bytes()):
            return f"{file.name} is empty"
    if not (state / MANIFEST).exists():
        return f"{saved.STATE}/{MANIFEST} is missing: what the processes wrote was not merged"
    listed = _listed(state)
    for process in state.glob("ocdbt.process_*"):
        if not (process / MANIFEST).exists():  # of a process that had nothing to write
            continue
        if lost := sorted(_listed(process).keys() - listed.keys()):
            return f"{lost[0]} of {process.name} is missing in {saved.STATE}/{MANIFEST}"
    return _missing(metadata["leaves"], state, listed) or _cut_off(state, listed)


def _spec(state: epath.Path) -> dict[str, str]:
    """A directory for TensorStore; not as a URL, which would have its own meaning for some characters."""
    name = os.fspath(state)
    if not is_remote(name):
        return {"driver": "file", "path": f"{name}/"}
    bucket, _, rest = name.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}


def _dump(directory: epath.Path, node: str | None = None) -> Any:
    """The manifest of a directory, or what lies at a place that it names."""
    return tensorstore.ocdbt.dump(
        tensorstore.KvStore.open(_spec(directory)).result(), node
    ).result()


def _listed(directory: epath.Path) -> dict[str, dict[str, Any]]:
    """By key, all that the newest version of the manifest of a directory lists."""
    found: dict[str, dict[str, Any]] = {}
    nodes: list[tuple[Any, bytes]] = [
        (version["root"].get("location"), b"") for version in _dump(directory)["versions"][-1:]
    ]
    while nodes:
        location, prefix = nodes.pop()
        node: Any = _dump(directory, location) if location else {"height": 0, "entries": []}
        for entry in node["entries"]:
            if node["height"]:
                nodes.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            else:
                found[(prefix + entry["key"]).decode()] = entry
    return found


def _missing(
    leaves: Mapping[str, Any], state: epath.Path, listed: Mapping[str, dict[str, Any]]
) -> str:
    """Which leaf the manifest lacks, or has not whole."""
    described: dict[str, Any] = {}
    chunks: dict[str, int] = {}
    for key, entry in listed.items():
        if match := _KEY.fullmatch(key):
            name = match[1].replace("/", ".")  # Orbax joins the parts of a leaf's name by dots
            if match[2] == "zarr.json":
                value = entry.get("inline_value") or _dump(state, entry["indirect_value"])
                described[name] = json.loads(value)
            else:
                chunks[name] = chunks.get(name, 0) + 1
    for leaf in leaves:
        name = leaf.replace("/", ".")
        if name not in described:
            return f"{leaf} is missing in {saved.STATE}/{MANIFEST}"
        shape, chunk = (
            described[name]["shape"],
            described[name]["chunk_grid"]["configuration"]["chunk_shape"],
        )
        wanted = math.prod(-(-n // size) for n, size in zip(shape, chunk, strict=True))
        if (found := chunks.get(name, 0)) != wanted:
            return f"{found} of {wanted} chunks of {leaf} are in {saved.STATE}/{MANIFEST}"
    return ""


def _cut_off(state: epath.Path, listed: Mapping[str, dict[str, Any]]) -> str:
    """Which data file is not there, or shorter than what the manifest has in it."""
    lengths: dict[str, int] = {}
    for entry in listed.values():
        if place := entry.get("indirect_value"):
            _, root, name, start, size = place.split(":")
            lengths[root + name] = max(lengths.get(root + name, 0), int(start) + int(size))
    for file, length in lengths.items():
        path = state / file
        if not path.exists():
            return f"{saved.STATE}/{file} is missing"
        if (size := path.stat().length) < length:
            return f"{saved.STATE}/{file} has {size:,} bytes of at least {length:,}"
    return ""
