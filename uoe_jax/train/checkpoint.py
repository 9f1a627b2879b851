"""Checkpoints: `<workdir>/checkpoints/<step>`, written in the background, complete or absent. The only user of Orbax.

What Orbax leaves to its user is done here, because each of these was seen to go wrong in silence: it casts on restore
when dtypes differ, lists a step that is still being written, and tells of a failed save only at the next one. Which
checkpoints stay is decided here too: Orbax's BestN keeps every checkpoint without metrics for ever and lets a NaN loss
displace the best one, its list loses the steps it meant to delete when the save fails, and a process killed while Orbax
deletes leaves half a checkpoint in the list (seen in one of four kills of a fast save loop).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib.metadata
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.processes import by_first, is_first, together

log = logging.getLogger(__name__)


def _drop_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save a dozen times over, a thousand lines in all, and then raises it: that is enough."""
    return log.isEnabledFor(logging.DEBUG) or not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


logging.getLogger("absl").addFilter(_drop_orbax_tracebacks)

FORMAT_VERSION = 1  # of what this module adds to a checkpoint; a reader refuses a higher one
SPACE_MARGIN = 1.1  # file metadata and chunk padding; the state itself compresses hardly at all
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
_OURS = ("format_version", "versions", "leaves")  # top-level metadata keys that a caller may not use
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointDamaged(RunError):
    """A checkpoint is listed but cannot be read back; an older one may still be good."""


class CheckpointStore:
    """The checkpoints of one workdir. One writer a directory; in a multi-process run every process makes every call.

    Args:
      workdir: the run's directory, local or `gs://`.
      keep_latest: how many of the newest checkpoints stay (at least 1); older ones go once a new one is committed.
      keep_best: how many of those with the lowest metrics["loss"] stay as well.
      read_only: for evaluation and export: touches nothing, also not what a run beside it is writing.

    Raises:
      UserError: the directory cannot be made or written, or (read_only) is not there.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], keep_latest: int = 2, keep_best: int = 1, read_only: bool = False
    ) -> None:
        if keep_latest < 1:
            raise ConfigError("checkpoint.keep_latest", keep_latest, "must be at least 1, or nothing could be resumed")
        if keep_best < 0:
            raise ConfigError("checkpoint.keep_best", keep_best, "must be 0 or more")
        self._remote = "://" in os.fspath(workdir)
        root = epath.Path(workdir)
        # Orbax refuses a relative path after it has made directories there.
        self.directory = (root if self._remote else root.expanduser().resolve()) / "checkpoints"
        self._read_only = read_only
        self._keep_latest, self._keep_best = keep_latest, keep_best
        # Step, loss and bytes of the save that was not yet seen to end.
        self._in_flight: tuple[int, float | None, int] | None = None
        self._deleter = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._deletions: list[concurrent.futures.Future[None]] = []
        self._closed = False
        together(self._open_directory)
        if self._remote and not read_only:
            log.info("free space is not checked before a checkpoint: %s is not a local directory", self.directory)
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # _prune decides
            # A process killed while it saved or deleted leaves `*.orbax-checkpoint-tmp*`, which nobody else removes.
            cleanup_tmp_directories=not read_only,
        )
        # The committed steps and their losses; the same in every process, as no two look at the disk at one moment.
        found = by_first(lambda: [[info.step, _loss(info.metrics)] for info in self._orbax.checkpoints])
        self._losses: dict[int, float | None] = {step: loss for step, loss in found}

    def _open_directory(self) -> None:
        if self._read_only:
            if not self.directory.is_dir():
                raise UserError(f"{self.directory}: there are no checkpoints here; check --workdir")
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".write_test_{jax.process_index()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.directory}: cannot write here ({reason}); choose another --workdir") from error

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts to write `state` as the checkpoint of `step`; returns once the buffers are copied and may be donated.

        Waits for the save before this one, if that is still being written.

        Args:
          step: the checkpoint's name, 0 or more.
          state: a pytree of jax.Array (typed PRNG keys too), none of size 0.
          metrics: metrics["loss"], where it is there and finite, makes this checkpoint a candidate for the best.
          metadata: JSON values to keep with the checkpoint, such as the resolved configuration.

        Returns:
          False, with a line in the log, where a checkpoint of this step is there already; it is left as it is.

        Raises:
          RunError: no space for this checkpoint, or the save before this one failed.
          UserError: an array of size 0.
          ValueError: a leaf that is not a jax.Array, a bad step, a reserved metadata key (the caller's mistakes).
        """
        if self._read_only:
            raise ValueError("this CheckpointStore was opened with read_only=True")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an int of 0 or more, not {step!r}")
        metadata = dict(metadata or {})
        if reserved := sorted(set(metadata) & set(_OURS)):
            raise ValueError(f"metadata keys {reserved} are this module's own")
        leaves = _describe(state)
        nbytes = _check_storable(state)
        self.wait()
        if step in self.steps():
            log.warning("a checkpoint of step %d is there already in %s; left as it is", step, self.directory)
            return False
        by_first(lambda: self._check_space(step, nbytes))
        if any(info.step == step for info in self._orbax.checkpoints):
            self._orbax.reload()  # its list does not know what _prune deleted
        loss = _loss(metrics)
        self._in_flight = (step, loss, nbytes)
        try:
            self._orbax.save_async(
                step,
                state,
                metrics={name: float(value) for name, value in metrics.items()} if loss is not None else None,
                custom_metadata={
                    **metadata, "format_version": FORMAT_VERSION, "versions": _versions(), "leaves": leaves,
                },
                force=True,  # the caller has decided; Orbax's own policy would save as often as it can
            )
        except Exception as error:
            raise self._save_failed(error) from error
        return True

    def check(self) -> None:
        """Raises RunError if a save failed in the background; costs nothing and does not wait: call it every step."""
        if self._in_flight is not None and not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Blocks until the save in flight, if any, is committed; RunError if it failed."""
        if self._in_flight is None:
            return
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._save_failed(error) from error
        step, loss, _ = self._in_flight
        self._in_flight = None
        self._losses[step] = loss
        self._prune()

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; one in flight counts once wait() or check() saw it end."""
        return sorted(self._losses)

    def latest_step(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The committed step with the lowest loss (the newest of equals), or None where no checkpoint has one."""
        return next(iter(self._best_first()), None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved with a checkpoint: the caller's metadata, `format_version`, `versions` (package: version) and
        `leaves` ("params/w": {"dtype": "bfloat16", "shape": [3, 4]}).

        Raises:
          UserError: no such step, or written by a newer format.
          CheckpointDamaged: it cannot be read.
        """
        self.wait()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.directory}: there is no checkpoint of step {step} (there are: {there})")
        with self._damage(step):
            found = self._orbax.metadata(step).custom_metadata
        if not found or "format_version" not in found:
            raise CheckpointDamaged(f"{self.directory / str(step)}: this checkpoint has lost its metadata; "
                                    "remove the directory to resume from an older one")
        if found["format_version"] > FORMAT_VERSION:
            raise UserError(f"{self.directory / str(step)}: format_version={found['format_version']} is newer than "
                            f"{FORMAT_VERSION}, the newest this uoe_jax reads; update uoe_jax")
        return dict(found)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads the checkpoint of `step` into the structure, dtypes, shapes and shardings of `abstract_state`.

        Args:
          step: one of steps().
          abstract_state: the tree that was saved, with a jax.ShapeDtypeStruct with a sharding (or an array) for each
            leaf. The sharding may differ from the one at the time of the save, nothing else may.

        Raises:
          UserError: no such step, or the checkpoint has other leaves, dtypes or shapes.
          CheckpointDamaged: it cannot be read back.
          ValueError: a leaf without a sharding (Orbax would fall back on the saved devices).
        """
        saved = self.metadata(step)["leaves"]
        for path, leaf in jax.tree.leaves_with_path(abstract_state):
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(f"abstract_state: {_name(path)} has no sharding")
        if differences := list(_differences(saved, _describe(abstract_state))):
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(f"{self.directory / str(step)}: this checkpoint does not fit the model: {differences[0]}"
                            f"{more}; use the configuration it was saved with, or another --workdir")
        with self._damage(step):
            state = self._orbax.load(step, abstract_state)
        # Here, once leaves carry fingerprints: compare, and let the caller quarantine a step that does not match.
        return state

    def close(self) -> None:
        """Waits for the save in flight and lets Orbax go; RunError if that save failed. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._deleter.shutdown()
            with contextlib.suppress(Exception):  # Orbax raises once more what wait() has just reported
                self._orbax.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RunError as error:
            if kind is None:
                raise
            log.error("%s", error)  # the error that is already on its way matters more

    def _best_first(self) -> list[int]:
        scored = sorted((loss, -step) for step, loss in self._losses.items() if loss is not None)
        return [-negative for _, negative in scored]

    def _prune(self) -> None:
        """Deletes what is neither among the latest nor the best; called when a save is committed."""
        keep = {*self.steps()[-self._keep_latest :], *self._best_first()[: self._keep_best]}
        for step in set(self._losses) - keep:
            del self._losses[step]
            if is_first():
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Makes a step disappear at once, and its files in the background."""
        path = self.directory / str(step)
        try:
            if self._remote:  # no rename there; what has no commit file is no checkpoint
                (path / "commit_success.txt").unlink(missing_ok=True)
            else:  # a name that Orbax cleans up when the directory is next opened
                path = path.rename(self.directory / f"{step}.orbax-checkpoint-tmp-{time.time_ns()}")
        except OSError as error:
            log.warning("%s: this old checkpoint could not be deleted (%s)", path, error)
            return
        self._deletions.append(self._deleter.submit(path.rmtree))

    def _check_space(self, step: int, nbytes: int) -> None:
        for deletion in self._deletions:
            if error := deletion.exception():  # waits for it
                log.warning("%s: an old checkpoint could not be deleted (%s)", self.directory, error)
        self._deletions.clear()
        if self._remote:
            return
        if _free_bytes(self.directory) < nbytes * SPACE_MARGIN:
            raise self._no_space(step, nbytes)

    def _no_space(self, step: int, nbytes: int) -> RunError:
        free = "unknown" if self._remote else f"{_free_bytes(self.directory):,}"
        return RunError(
            f"{self.directory}: no space for the checkpoint of step {step}: {math.ceil(nbytes * SPACE_MARGIN):,} bytes "
            f"needed, {free} free; make space and run the same command again ({self._resumes_from()})"
        )

    def _resumes_from(self) -> str:
        latest = self.latest_step()
        return "no checkpoint is complete yet" if latest is None else f"it resumes from step {latest}"

    def _save_failed(self, error: Exception) -> RunError:
        """Makes the store usable again after a failed save, and the error to raise."""
        assert self._in_flight is not None
        step, _, nbytes = self._in_flight
        self._in_flight = None
        if jax.process_count() == 1:  # what was written so far fills the very disk that is full
            for left in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    left.rmtree()
        if _is_no_space(error):
            return self._no_space(step, nbytes)
        return RunError(f"{self.directory}: the checkpoint of step {step} could not be written "
                        f"({_first_line(error)}); mend that and run the same command again ({self._resumes_from()})")

    @contextlib.contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointDamaged(
                f"{self.directory / str(step)}: this checkpoint cannot be read ({_first_line(error)}); "
                "move the directory away to resume from an older one"
            ) from error


def _loss(metrics: Mapping[str, Any] | None) -> float | None:
    """The loss that ranks a checkpoint; None where there is none or it is not finite."""
    loss = math.nan if not metrics else float(metrics.get("loss", math.nan))
    return loss if math.isfinite(loss) else None


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    """{leaf name: {"dtype", "shape"}} of a tree of arrays or ShapeDtypeStructs. Orbax's own record of a typed PRNG key
    is plain uint32, and of a named tuple a list or dict, so we keep ours. Fingerprints belong here as well."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = _name(path)
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(f"{name}: leaves must be arrays, not {type(leaf).__name__}")
        if name in found:
            raise ValueError(f"{name}: two leaves have this name")
        found[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    return found


def _check_storable(state: Any) -> int:
    """Refuses what Orbax would refuse too late or not restore; returns the bytes of the whole state, all hosts."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{_name(path)}: must be a jax.Array, not {type(leaf).__name__}")
        if leaf.size == 0:
            raise UserError(f"{_name(path)} has shape {leaf.shape}: an array of size 0 cannot be saved; "
                            "the configuration must not make one (no layers, no experts)")
        total += leaf.size * leaf.dtype.itemsize
    return total


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    def text(leaf: Mapping[str, Any]) -> str:
        return f"{leaf['dtype']}{list(leaf['shape'])}"

    for name in sorted({*saved, *wanted}):
        if name not in wanted:
            yield f"{name} is in the checkpoint and not in the model"
        elif name not in saved:
            yield f"{name} is in the model and not in the checkpoint"
        elif text(saved[name]) != text(wanted[name]):
            yield f"{name} is {text(saved[name])} in the checkpoint and {text(wanted[name])} in the model"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _free_bytes(directory: epath.Path) -> int:
    return shutil.disk_usage(os.fspath(directory)).free


def _is_no_space(error: BaseException) -> bool:
    """Whether an error or one it came from says that the disk, the quota or the file size limit is used up. The writer
    of the arrays (TensorStore) gives the reason as text only."""
    link: BaseException | None = error
    while link is not None:
        if getattr(link, "errno", None) in _NO_SPACE or any(os.strerror(code) in str(link) for code in _NO_SPACE):
            return True
        link = link.__cause__ or link.__context__
    return False


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
