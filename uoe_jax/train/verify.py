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
from typing import Any, Iterator, Mapping

import jax
import tensorstore
from etils import epath

from uoe_jax import processes
from uoe_jax.errors import RunError, UserError
from uoe_jax.train import saved
from uoe_jax.train.fingerprint import leaf_name
from uoe_jax.workdir import SHOWS_UP_S, is_remote

MANIFEST = "manifest.ocdbt"
_BESIDE = ("_METADATA", "_sharding")  # of Orbax: without them a restore fails, or gives another type
_KEY = re.compile(r"(.*)/(zarr\.json|c(?:/\d+)*)", re.DOTALL)  # in the manifest: the description of an array, or a chunk


def check_storable(state: Any) -> int:
    """Refuses what Orbax would refuse too late or not restore; returns the bytes of the whole state, all hosts."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{leaf_name(path)}: must be a jax.Array, not {type(leaf).__name__}")
        if leaf.size == 0:
            raise UserError(f"{leaf_name(path)} has shape {leaf.shape}: an array of size 0 cannot be saved; "
                            "the configuration must not make one (no layers, no experts)")
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
    remedy = "run the same command again" + (f" (it resumes from step {latest})" if latest is not None else "")
    if latest is None and moved:
        remedy = f"move {aside} away and {remedy}, which then starts from the beginning"
    raise RunError(f"{path}: this checkpoint was written and is not whole ({reason}){moved}; mend that and {remedy}")


def fault(path: epath.Path) -> str:
    """What is wrong with the checkpoint at `path`, "" where nothing is; to be called in process 0.

    Its metadata must be as they were written, the manifest must list every leaf with all of its chunks, and the data
    files that it names must be there and long enough. Takes some milliseconds, and reads no array data.

    Raises:
      RunError: it cannot be read now (rights, memory, the network).
    """
    # What other machines wrote may show up late on a network file system.
    until = time.monotonic() + (SHOWS_UP_S if processes.are_several() else 0)
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
    metadata, state = saved.metadata_or_fault(path), path / saved.STATE
    if isinstance(metadata, str):
        return metadata
    for file in (*(state / name for name in _BESIDE), *(state / "array_metadatas").iterdir()):
        if not json.loads(file.read_bytes()):
            return f"{file.name} is empty"
    if not (state / MANIFEST).exists():
        return f"{saved.STATE}/{MANIFEST} is missing: what the processes wrote was not merged"
    described: dict[str, Any] = {}
    chunks: dict[str, int] = {}
    lengths: dict[str, int] = {}
    base = tensorstore.KvStore.open(_spec(state)).result()
    for key, entry in _entries(base):
        place = entry.get("indirect_value")
        if match := _KEY.fullmatch(key):
            name, what = match.groups()
            if what == "zarr.json":
                value = tensorstore.ocdbt.dump(base, place).result() if place else entry["inline_value"]
                described[name] = json.loads(value)
            else:
                chunks[name] = chunks.get(name, 0) + 1
        if place:
            _, root, file, start, length = place.split(":")
            lengths[root + file] = max(lengths.get(root + file, 0), int(start) + int(length))
    return _missing(metadata["leaves"], described, chunks) or _cut_off(state, lengths)


def _spec(state: epath.Path) -> dict[str, str]:
    """A directory for TensorStore; not as a URL, which would have its own meaning for some characters."""
    name = os.fspath(state)
    if not is_remote(name):
        return {"driver": "file", "path": f"{name}/"}
    bucket, _, rest = name.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{rest}/"}


def _entries(base: tensorstore.KvStore) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, entry) of all that the newest version of a manifest lists."""
    roots = [(version["root"].get("location"), b"") for version in tensorstore.ocdbt.dump(base).result()["versions"][-1:]]
    while roots:
        location, prefix = roots.pop()
        node = tensorstore.ocdbt.dump(base, location).result() if location else {"entries": []}
        for entry in node["entries"]:
            if node["height"]:
                roots.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            else:
                yield (prefix + entry["key"]).decode(), entry


def _missing(leaves: Mapping[str, Any], described: Mapping[str, Any], chunks: Mapping[str, int]) -> str:
    """Which leaf the manifest lacks, or has not whole."""
    listed = {name.replace("/", "."): name for name in described}  # Orbax joins the parts of a leaf's name by dots
    for leaf in leaves:
        name = listed.get(leaf.replace("/", "."))
        if name is None:
            return f"{leaf} is missing in {saved.STATE}/{MANIFEST}"
        shape, chunk = described[name]["shape"], described[name]["chunk_grid"]["configuration"]["chunk_shape"]
        wanted = math.prod(-(-n // size) for n, size in zip(shape, chunk, strict=True))
        if (found := chunks.get(name, 0)) != wanted:
            return f"{found} of {wanted} chunks of {leaf} are in {saved.STATE}/{MANIFEST}"
    return ""


def _cut_off(state: epath.Path, lengths: Mapping[str, int]) -> str:
    """Which data file is not there, or shorter than what the manifest has in it."""
    for file, length in lengths.items():
        path = state / file
        if not path.exists():
            return f"{saved.STATE}/{file} is missing"
        if (size := path.stat().length) < length:
            return f"{saved.STATE}/{file} has {size:,} bytes of at least {length:,}"
    return ""
