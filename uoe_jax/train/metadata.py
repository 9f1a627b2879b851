"""The files of a checkpoint besides its arrays: metadata, ranking loss, the list of steps.

Metadata are read by process 0 alone and carry a digest, so that no damage goes unnoticed. In them
are fingerprints of the arrays, of which neither Orbax nor TensorStore keeps a checksum: 32 bits a
leaf, the same on every mesh and number of processes.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from uoe_jax.distributed.coordination import on_process_zero
from uoe_jax.errors import AGAIN, RunError, UserError, os_error_as
from uoe_jax.workdir import is_remote, write_json

FORMAT_VERSION = 2  # of what this module adds to a checkpoint
# Top-level metadata keys that a caller may not use.
RESERVED = ("format_version", "versions", "leaves", "loss", "digest")
COMMITTED = "commit_success.txt"  # Orbax's; without a rename, what lacks it is no checkpoint
STATE = "state"  # the directory of a checkpoint's arrays
METADATA, _LOSS = "_CHECKPOINT_METADATA", "uoe_loss.json"
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
# Signs that reading failed though the checkpoint may be good. The names are TensorStore's.
_TRANSIENT = "RESOURCE_EXHAUSTED PERMISSION_DENIED UNAUTHENTICATED UNAVAILABLE DEADLINE_EXCEEDED"
_TRANSIENT_CODES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE)
_SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|credentials?|(api|access)_?key)$")
_USER_IN_URL = re.compile(r"(\w[\w+.-]*://)[^/\s:@]*:[^/\s]*@")
_REDACTED = "…redacted…"


class CheckpointDamaged(RunError):
    """A checkpoint cannot be read back as it was saved; an older one may still be good."""

    def __init__(self, path: epath.Path, reason: str) -> None:
        super().__init__(f"{path}: this checkpoint is damaged ({reason}); use another one")
        self.reason = reason


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{leaf: {"dtype", "shape"}} of a tree; Orbax has uint32 for keys, lists for named tuples."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if (name := leaf_name(path)) in found:
            raise ValueError(f"{name}: two leaves have this name")
        if leaf.sharding is None:  # Orbax would fall back on the saved devices
            raise ValueError(f"{name} has no sharding")
        found[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    return found


def kind(leaf: Mapping[str, Any]) -> str:
    """Dtype and shape of a described leaf, such as `float32[3, 4]`."""
    return f"{leaf['dtype']}{list(leaf['shape'])}"


def sealed(metadata: dict[str, Any], leaves: Any, loss: float | None) -> dict[str, Any]:
    """The metadata to store: the caller's without secrets, ours, and the digest of both."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    ours = {"format_version": FORMAT_VERSION, "versions": versions, "leaves": leaves, "loss": loss}
    return _with_digest({**_redacted(metadata), **ours})


def _redacted(value: Any, key: str = "") -> Any:
    """A JSON value without secrets: values of keys that name one, and passwords in addresses."""
    if _SECRET.search(re.split(r"[./]", key)[-1]) and value not in (None, ""):
        return _REDACTED
    if isinstance(value, Mapping):
        return {k: _redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(v) for v in value]
    return _USER_IN_URL.sub(rf"\1{_REDACTED}@", value) if isinstance(value, str) else value


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata of a checkpoint; UserError for another format, or CheckpointDamaged."""
    found = on_process_zero(lambda: metadata_or_fault(path))
    if isinstance(found, str):
        raise CheckpointDamaged(path, found)
    if (version := found["format_version"]) > FORMAT_VERSION:
        problem = f"is newer than {FORMAT_VERSION}, the newest that this uoe_jax reads"
        raise UserError(f"{path}: format_version={version} {problem}; update uoe_jax")
    return found


def metadata_or_fault(path: epath.Path) -> dict[str, Any] | str:
    """The metadata, or what is wrong with them; called in process 0."""
    try:
        found = json.loads((path / METADATA).read_bytes())["custom_metadata"]
        is_old = found["format_version"] == 1 and "leaves" in found  # which had no digest
        if not is_old:  # before the version is trusted: every later format keeps this digest
            return found if _has_digest(found) else f"{METADATA} is not as it was written"
    except Exception as error:
        raise_if_transient(path, error)
        return f"{METADATA} has lost its content: {first_line(error)}"
    problem = "format_version=1 is of an older uoe_jax and is not read any more"
    raise UserError(f"{path}: {problem}; start in a new --workdir")


def _with_digest(content: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(json.dumps(content))  # as a reader finds it: string keys, no tuples
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _has_digest(found: dict[str, Any]) -> bool:
    content = {name: value for name, value in found.items() if name != "digest"}
    return found["digest"] == _with_digest(content)["digest"]


def list_checkpoints(directory: epath.Path) -> dict[int, float | None]:
    """{step: ranking loss} of the checkpoints here, damaged ones too; called in process 0."""
    found = {}
    for path in directory.iterdir() if directory.is_dir() else ():  # gs:// has no empty directory
        is_step = re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir()
        if is_step and (not is_remote(path) or (path / COMMITTED).exists()):
            found[int(path.name)] = _read_loss(path)
    return found


def _read_loss(path: epath.Path) -> float | None:
    for name in (_LOSS, METADATA):
        # A checkpoint with an unreadable loss is never the best, but can be resumed.
        with contextlib.suppress(Exception):
            found = json.loads((path / name).read_bytes())
            found = found["custom_metadata"] if name == METADATA else found
            if _has_digest(found):
                return found["loss"]
    return None


def write_loss(path: epath.Path, loss: float) -> None:
    """Sets the ranking loss of a checkpoint after it was written, in a file of its own."""
    write_json(path / _LOSS, _with_digest({"loss": loss}))


def quarantine(path: epath.Path, directory: epath.Path) -> str:
    """Moves a damaged checkpoint into `directory`, under a free name; called in process 0."""
    names = itertools.chain([path.name], (f"{path.name}.{i}" for i in itertools.count(2)))
    target = next(directory / name for name in names if not (directory / name).exists())
    problem = f"{path}: this checkpoint is damaged and cannot be moved to {target}"
    remedy = "move it away by hand and run the same command again"
    with os_error_as(RunError, problem, remedy):
        directory.mkdir(exist_ok=True)
        if is_remote(path):  # no rename there; if interrupted, the original is still whole
            _copy_tree(path, target)
            path.rmtree()
        else:
            path.rename(target)
    return os.fspath(target)


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        _copy_tree(path, target / path.name) if path.is_dir() else path.copy(target / path.name)


def quarantined(directory: epath.Path) -> list[str]:
    """The names of the checkpoints moved there; called in process 0."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(name for name in names if name.split(".")[0].isdecimal())


def raise_if_transient(path: epath.Path, error: Exception) -> None:
    """RunError where `error` has a cause that may pass, such as the network."""
    kinds = (MemoryError, PermissionError, ConnectionError, TimeoutError)
    transient = isinstance(error, kinds) or getattr(error, "errno", None) in _TRANSIENT_CODES
    if transient or any(sign in str(error) for sign in _TRANSIENT.split()):
        raise RunError(f"{path}: cannot be read now ({first_line(error)}); {AGAIN}") from error


def first_line(error: BaseException) -> str:
    """The first cause of an error in one line; Orbax's messages have many."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"


class Fingerprints(NamedTuple):
    """Of the leaves of a tree, by name."""

    words: dict[str, str]  # 8 hex digits for each leaf; of typed PRNG keys, those of their data
    not_finite: list[str]  # floating leaves with a NaN or an infinity, in the order of the tree


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a tree, such as `params/layers/mlp/w`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fingerprints(tree: Any) -> Fingerprints:
    """Fingerprints of a tree of jax.Array on one mesh; the same in every process.

    Any change of one element changes its leaf's fingerprint; any other change does with probability
    1 - 2^-32. Moves only scalars between devices, and waits for the result.
    """
    named = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    first, replicated = next(iter(named.values())).sharding, None
    if isinstance(first, NamedSharding):
        replicated = NamedSharding(first.mesh, PartitionSpec())
    compiled = jax.jit(_all_words, out_shardings=replicated)  # so that every process can read them
    words, bad = jax.device_get(compiled(list(named.values())))
    hexes = {name: f"{int(word):08x}" for name, word in zip(named, words)}
    return Fingerprints(hexes, [name for name, is_bad in zip(named, bad) if is_bad])


def _all_words(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    words, bad = zip(*map(_word_and_bad, leaves))
    return jnp.stack(words), jnp.stack(bad)


def _word_and_bad(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Sum over elements of a hash of (bits, index), 1 if an element is not finite), both uint32.

    A sum modulo 2^32 has no order, so any sharding gives the same. The hash is not bits times a
    hash of the index: there a flip of any two signs would go unnoticed.
    """
    bits = _bits(x).astype(jnp.uint32)
    # The flat index, without a reshape, which would gather a sharded array.
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    h = bits ^ (index * jnp.uint32(0x9E3779B1))
    # Each line is a bijection, so that no change of one element is lost.
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    h ^= h >> 16
    bad = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.ones(x.shape, jnp.bool_)
    bad = jnp.broadcast_to(bad.reshape(bad.shape + (1,) * (h.ndim - bad.ndim)), h.shape)
    # Both in one reduction: read once, and compiled in a third of the time of two.
    zeros = (jnp.uint32(0), jnp.uint32(0))
    both, axes = (h, (~bad).astype(jnp.uint32)), tuple(range(h.ndim))
    return jax.lax.reduce(both, zeros, lambda a, b: (a[0] + b[0], a[1] | b[1]), axes)


def _bits(x: jax.Array) -> jax.Array:
    """The bits of x as unsigned integers; 64-bit values as two, in one more dimension."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_bits(x.real), _bits(x.imag)], axis=-1)
    width = min(8 * x.dtype.itemsize, 32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
