"""One checkpoint on the disk: what its metadata holds, and reading it back so that no damage goes unnoticed.

With `checkpoint` the only user of Orbax, which here has three faults: it casts where dtypes differ, restores flipped bits
without a word, and waits in a barrier for a process that has failed. So metadata are read by process 0 and carry a digest;
arrays are read by each process on its own, after which all agree, and each leaf is held against its fingerprint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
from typing import Any, Callable, Iterable, Iterator, Mapping, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from uoe_jax.distributed.coordination import RemoteProcessError, on_all, on_process_zero
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train.fingerprint import fingerprints, leaf_name
from uoe_jax.workdir import checkpoint_path, is_remote, locate, write_json

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT_VERSION = (
    2  # of what this module adds to a checkpoint; 1 had neither fingerprints nor digest
)
OURS = (
    "format_version",
    "versions",
    "leaves",
    "loss",
    "digest",
)  # top-level metadata keys that a caller may not use
COMMITTED = (
    "commit_success.txt"  # Orbax's; where there is no rename, what lacks it is no checkpoint
)
STATE = "state"  # of a checkpoint: the directory of its arrays
_METADATA, _TREE, _LOSS = "_CHECKPOINT_METADATA", "_METADATA", "uoe_loss.json"
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
_INIT_FROM = "config.train.init_from"
# Signs that reading failed though the checkpoint may be good: it must not be set aside. The names are TensorStore's.
_PASSING = (
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)
_PASSING_CODES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ESTALE)
_SECRET = re.compile(
    r"(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key)$", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"(\w[\w+.-]*://)[^/\s:@]*:[^/\s]*@")
_REDACTED = "…redacted…"


class CheckpointDamaged(RunError):
    """A checkpoint cannot be read back as it was saved; an older one may still be good."""

    def __init__(self, path: epath.Path, reason: str) -> None:
        super().__init__(f"{path}: this checkpoint is damaged ({reason}); use another one")
        self.reason = reason


class _Damage(RunError):
    """The reason alone, on its way to all processes."""


# --- the metadata -----------------------------------------------------------------------------------------------


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{leaf name: {"dtype", "shape"}} of a tree of arrays or ShapeDtypeStructs. Orbax's own record of a typed PRNG key
    is plain uint32, and of a named tuple a list or dict, so we keep ours."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = leaf_name(path)
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"{name}: leaves must be arrays, not {type(leaf).__name__}")
        if name in found:
            raise ValueError(f"{name}: two leaves have this name")
        found[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    return found


def sealed(
    metadata: Mapping[str, Any], leaves: Mapping[str, Any], loss: float | None
) -> dict[str, Any]:
    """The metadata to store: the caller's without secrets, ours, and the digest of both."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    ours = {"format_version": FORMAT_VERSION, "versions": versions, "leaves": leaves, "loss": loss}
    return _sealed({**redacted(metadata), **ours})


def redacted(value: Any, key: str = "") -> Any:
    """A JSON value without what must not be passed on with a checkpoint: secrets by their key, passwords in addresses."""
    if _SECRET.search(re.split(r"[./]", key)[-1]) and value not in (None, ""):
        return _REDACTED
    if isinstance(value, Mapping):
        return {k: redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(v) for v in value]
    return _USER_IN_URL.sub(rf"\1{_REDACTED}@", value) if isinstance(value, str) else value


def read_metadata(path: epath.Path) -> dict[str, Any]:
    """The metadata of a checkpoint as process 0 reads them, in every process.

    Raises:
      UserError: written by a newer format.
      CheckpointDamaged: they are not there, or not as they were written.
    """
    found = on_process_zero(lambda: metadata_or_fault(path))
    if isinstance(found, str):
        raise CheckpointDamaged(path, found)
    if found["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={found['format_version']} is newer than {FORMAT_VERSION}, the newest "
            "this uoe_jax reads; update uoe_jax"
        )
    return found


def metadata_or_fault(path: epath.Path) -> dict[str, Any] | str:
    """The metadata, or what is wrong with them; to be called in process 0."""
    try:
        found = json.loads((path / _METADATA).read_bytes())["custom_metadata"]
        if found["format_version"] == 1 and "digest" not in found:
            found["leaves"].items()  # nothing else can be checked there
        elif not _is_sealed(
            found
        ):  # before the version is believed; every later format keeps this digest
            return f"{_METADATA} is not as it was written"
    except Exception as error:
        raise_if_passing(path, error)
        return f"{_METADATA} has lost its content: {first_line(error)}"
    return found


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    content = json.loads(
        json.dumps(content)
    )  # as a reader finds it: keys are strings, tuples are lists
    return {**content, "digest": _digest(content)}


def _is_sealed(found: Mapping[str, Any]) -> bool:
    return found["digest"] == _digest(
        {name: value for name, value in found.items() if name != "digest"}
    )


# --- the list of checkpoints and their losses ---------------------------------------------------------------------


def listed(directory: epath.Path) -> dict[int, float | None]:
    """{step: the loss that ranks it} of the checkpoints here, damaged ones too; to be called in process 0."""
    found = {}
    for path in (
        directory.iterdir() if directory.is_dir() else ()
    ):  # an empty one does not exist on gs://
        if (
            re.fullmatch("0|[1-9][0-9]*", path.name)
            and path.is_dir()
            and (not is_remote(path) or (path / COMMITTED).exists())
        ):
            found[int(path.name)] = _read_loss(path)
    return found


def ranking_loss(metrics: Mapping[str, Any] | None) -> float | None:
    """The loss that ranks a checkpoint; None where there is none or it is not finite."""
    loss = math.nan if not metrics else float(metrics.get("loss", math.nan))
    return loss if math.isfinite(loss) else None


def _read_loss(path: epath.Path) -> float | None:
    for name in (_LOSS, _METADATA):
        with contextlib.suppress(
            Exception
        ):  # a step without its loss is no best one, and can be resumed all the same
            found = json.loads((path / name).read_bytes())
            found = found["custom_metadata"] if name == _METADATA else found
            if _is_sealed(found):
                return found["loss"]
    return None


def write_loss(path: epath.Path, loss: float) -> None:
    """Gives a checkpoint its loss after it was written, in a file of its own, whole or not at all."""
    write_json(path / _LOSS, _sealed({"loss": loss}))


def move_aside(path: epath.Path, aside: epath.Path) -> epath.Path:
    """Moves a damaged checkpoint below `aside`, under a name that is free there; to be called in process 0."""
    names = itertools.chain([path.name], (f"{path.name}.{i}" for i in itertools.count(2)))
    target = next(aside / name for name in names if not (aside / name).exists())
    try:
        aside.mkdir(exist_ok=True)
        if is_remote(
            path
        ):  # no rename there; if this is cut off, it is whole where it was and is copied once more
            _copy_tree(path, target)
            path.rmtree()
        else:
            path.rename(target)
    except OSError as error:
        raise RunError(
            f"{path}: this checkpoint is damaged and cannot be moved to {target} ({first_line(error)}); move it "
            "away by hand and run the same command again"
        ) from error
    return target


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        _copy_tree(path, target / path.name) if path.is_dir() else path.copy(target / path.name)


def names_aside(aside: epath.Path) -> list[str]:
    """The names of the checkpoints that were moved there; to be called in process 0."""
    names = [path.name for path in aside.iterdir()] if aside.is_dir() else []
    return sorted(name for name in names if name.split(".")[0].isdecimal())


# --- reading back ---------------------------------------------------------------------------------------------------


def restore(path: epath.Path, abstract: Any, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """(The whole state of a checkpoint, or `partial` what is asked for of it; its metadata); see CheckpointStore.restore."""
    _check_placed(abstract)
    metadata, wanted = read_metadata(path), describe(abstract)
    there = {
        name: leaf for name, leaf in metadata["leaves"].items() if name in wanted or not partial
    }
    if not partial and all(name.startswith("params/") for name in there):
        raise UserError(
            f"{path}: holds parameters alone, as an imported model does; train them in a new --workdir with "
            f"--{_INIT_FROM}={path}"
        )
    if metadata["format_version"] == 1 and not partial:
        raise UserError(
            f"{path}: format_version=1 is of an older uoe_jax, whose training state lacks leaves; start in a "
            f"new --workdir with --{_INIT_FROM}={path}"
        )
    if differences := list(_differences(there, wanted)):
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"{path}: this checkpoint does not fit the model: {differences[0]}{more}; use the configuration "
            "it was saved with, or another --workdir"
        )
    return _load(path, abstract, there, partial), metadata


def checkpoints_of(path: str | os.PathLike[str]) -> list[str]:
    """The checkpoints of a workdir, the newest first, or the one given; the same in all processes.

    Raises:
      ConfigError: there is none.
    """

    def found() -> list[str]:
        root = checkpoint_path(path, _INIT_FROM)
        below = root / "checkpoints"
        if below.is_dir():
            return [os.fspath(below / str(step)) for step in sorted(listed(below), reverse=True)]
        is_one = (root / _METADATA).exists() or (
            root.is_dir() and root.parent.name == "checkpoints"
        )
        return [os.fspath(root)] if is_one else []

    places = on_process_zero(found)
    if not places:
        remedy = (
            "there is no checkpoint; give the workdir of a run, or one of its checkpoints/<step>"
        )
        raise ConfigError(_INIT_FROM, os.fspath(path), remedy)
    return places


def load_params(
    path: str | os.PathLike[str], abstract_params: Any
) -> tuple[Any, list[str], dict[str, str]]:
    """The parameters of another run where they fit: same name, dtype and shape. Touches nothing there.

    Args:
      path: a workdir, of which the newest good checkpoint is taken, or one checkpoint; local or `gs://`.
      abstract_params: nested dicts of jax.ShapeDtypeStruct with shardings.

    Returns:
      (nested dicts with None for what does not fit, names of the leaves taken, {name of the others: why}). Names as in
      the checkpoint, `params/…`.

    Raises:
      ConfigError: no checkpoint there that is good, or nothing fits.
      CheckpointDamaged: the checkpoint given is damaged.
    """
    _check_placed(abstract_params)
    places = checkpoints_of(path)
    for place in places:
        try:
            return _params_of(locate(place), abstract_params, os.fspath(path))
        except CheckpointDamaged as error:
            if len(places) == 1:
                raise
            log.warning("%s", error)
    raise ConfigError(
        _INIT_FROM,
        os.fspath(path),
        f"all of its {len(places)} checkpoints are damaged; give another run",
    )


def _params_of(
    path: epath.Path, abstract: Any, given: str
) -> tuple[Any, list[str], dict[str, str]]:
    metadata = read_metadata(path)
    there, here = metadata["leaves"], describe({"params": abstract})
    fresh = {
        name: f"{_kind(there[name])} there, {_kind(leaf)} here"
        if name in there
        else "not in the checkpoint"
        for name, leaf in here.items()
        if name not in there or _kind(there[name]) != _kind(leaf)
    }
    taken = [name for name in here if name not in fresh]
    if not taken:
        raise ConfigError(
            _INIT_FROM,
            given,
            f"none of its parameters fits the model ({_first(fresh)}); give a run of a "
            "model that has layers in common",
        )
    if metadata["format_version"] == 1:
        log.warning(
            "%s: was written by an older uoe_jax, without fingerprints, so damage would not be noticed",
            path,
        )
    part = _load(path, {"params": _only(abstract, {*taken}, "params/")}, there, partial=True)
    loaded = {leaf_name(at): leaf for at, leaf in jax.tree.leaves_with_path(part)}
    return (
        jax.tree.map_with_path(lambda at, _: loaded.get(f"params/{leaf_name(at)}"), abstract),
        taken,
        fresh,
    )


def _first(reasons: Mapping[str, str]) -> str:
    return next((f"{name}: {why}" for name, why in reasons.items()), "it has none")


def _only(tree: Mapping[str, Any], names: set[str], prefix: str) -> dict[str, Any]:
    """Nested dicts with only the named leaves, and no empty dict."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            value = _only(value, names, f"{prefix}{key}/")
            if value:
                found[key] = value
        elif f"{prefix}{key}" in names:
            found[key] = value
    return found


def _load(path: epath.Path, abstract: Any, leaves: Mapping[str, Any], partial: bool = False) -> Any:
    """Reads a tree onto its shardings and holds it against the fingerprints in `leaves`; CheckpointDamaged in every
    process where it fails in one."""

    def there() -> None:
        if not (path / STATE / _TREE).exists():
            raise FileNotFoundError(f"{STATE}/{_TREE} is missing")

    def read() -> Any:
        with _alone(partial), jax.transfer_guard("allow"):
            return ocp.load(path, abstract)

    # First what Orbax asks before it counts its operations: were one process a count behind, the next save would hang.
    _in_each(path, there)
    tree = _in_each(path, read)
    words, read_as = fingerprints(tree).words, describe(tree)
    wrong = [name for name, word in words.items() if leaves[name].get("fingerprint", word) != word]
    # Without its file `_sharding` Orbax gives the data of a typed key in place of the key.
    wrong += [name for name, leaf in read_as.items() if _kind(leaf) != _kind(leaves[name])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointDamaged(path, f"{wrong[0]}{more} is not as it was saved")
    return tree


def _check_placed(abstract: Any) -> None:
    """ValueError at a leaf without a sharding: Orbax would fall back on the saved devices."""
    for at, leaf in jax.tree.leaves_with_path(abstract):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"{leaf_name(at)} has no sharding")


def _alone(partial: bool) -> ocp.Context:
    """Orbax without barriers: a process that fails would leave the others in one."""
    context = ocp.Context()
    context.multiprocessing.primary_host = me = ocp.multihost.process_index()
    context.multiprocessing.active_processes = {me}
    context.pytree.loading.partial_load = partial
    return context


def _in_each(path: epath.Path, do: Callable[[], T]) -> T:
    """What `do` gives in this process, once it has worked in all; else CheckpointDamaged, or RunError, in all."""
    values: list[T] = []
    reasons: list[str] = []

    def attempt() -> None:
        try:
            values.append(do())
        except Exception as error:
            raise_if_passing(path, error)
            reasons.append(f"it cannot be read: {first_line(error)}")

    def tell() -> None:
        if reasons:
            raise _Damage(reasons[0])

    on_all(attempt)
    try:
        on_all(tell)
    except (_Damage, RemoteProcessError) as error:
        raise CheckpointDamaged(path, str(error)) from error
    return values[0]


def raise_if_passing(path: epath.Path, error: Exception) -> None:
    """RunError where reading failed for a reason that may pass, and says nothing of the checkpoint."""
    kinds = (MemoryError, PermissionError, ConnectionError, TimeoutError)
    code = getattr(error, "errno", None)
    if (
        isinstance(error, kinds)
        or code in _PASSING_CODES
        or any(sign in str(error) for sign in _PASSING)
    ):
        raise RunError(
            f"{path}: cannot be read now ({first_line(error)}); fix that and run the same command "
            "again"
        ) from error


def _kind(leaf: Mapping[str, Any]) -> str:
    return f"{leaf['dtype']}{list(leaf['shape'])}"


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*saved, *wanted}):
        if name not in wanted:
            yield f"{name} is in the checkpoint and not in the model"
        elif name not in saved:
            yield f"{name} is in the model and not in the checkpoint"
        elif _kind(saved[name]) != _kind(wanted[name]):
            yield f"{name} is {_kind(saved[name])} in the checkpoint and {_kind(wanted[name])} in the model"


def first_line(error: BaseException) -> str:
    """What an error came from, in one line, whatever Orbax put into it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines: Iterable[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {next(iter(lines), 'no message')[:300]}"
