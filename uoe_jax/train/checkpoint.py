"""Checkpoints: `<workdir>/checkpoints/<step>`, written in the background, complete or absent; what is found damaged is
moved to `<workdir>/damaged/<step>`. With `orbax_writer` and `saved`, which reads a checkpoint, the only user of Orbax.

What Orbax leaves to its user is done here, because each of these was seen to go wrong in silence: it lists a step that
is still being written, and tells of a failed save only at the next one. Which checkpoints there are, which is the best
and which stay is decided here too: Orbax fails to open where the metadata of one are garbage, its BestN keeps every
checkpoint without metrics for ever and lets a NaN loss displace the best one, its list loses the steps it meant to delete
when the save fails, and a process killed while Orbax deletes leaves half a checkpoint in the list (seen in one of four
kills of a fast save loop).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from uoe_jax.distributed.coordination import is_process_zero, on_all, on_process_zero
from uoe_jax.errors import BadNumbers, ConfigError, RunError, UserError
from uoe_jax.train import saved, verify
from uoe_jax.train.fingerprint import fingerprints
from uoe_jax.train.orbax_writer import is_no_space, open_writer
from uoe_jax.train.saved import CheckpointDamaged, first_line
from uoe_jax.workdir import checkpoint_path, is_remote

log = logging.getLogger(__name__)

SPACE_MARGIN = 1.1  # file metadata and chunk padding; the state itself compresses hardly at all


class CheckpointStore:
    """The checkpoints of one workdir. One writer a directory; in a multi-process run every process makes every call.

    Args:
      workdir: the run's directory, local or `gs://`.
      keep_latest: how many of the newest checkpoints stay (at least 1); older ones go once a new one is committed.
      keep_best: how many of those with the lowest metrics["loss"] stay as well.
      write_bytes: host memory that writing may take at a time, more than the largest leaf's; None: as much as there is.
      read_only: for evaluation and export: touches nothing, also not what a run beside it is writing.

    Raises:
      UserError: the directory cannot be made or written, or (read_only) is not there.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep_latest: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
        write_bytes: int | None = None,
    ) -> None:
        if keep_latest < 1:
            raise ConfigError(
                "checkpoint.keep_latest",
                keep_latest,
                "must be at least 1, or nothing could be resumed",
            )
        if keep_best < 0:
            raise ConfigError("checkpoint.keep_best", keep_best, "must be 0 or more")
        # Absolute: Orbax refuses a relative path after it has made directories there.
        root = checkpoint_path(workdir)
        self._remote = is_remote(root)
        self.directory, self._aside = root / "checkpoints", root / "damaged"
        self._read_only = read_only
        self._keep_latest, self._keep_best = keep_latest, keep_best
        # Step, loss and bytes of the save that was not yet seen to end.
        self._in_flight: tuple[int, float | None, int] | None = None
        self._deleter = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._deletions: list[concurrent.futures.Future[None]] = []
        self._closed = False
        on_all(self._open_directory)
        self._orbax = open_writer(self.directory, read_only, write_bytes)
        self._losses: dict[int, float | None] = {}  # of the committed steps
        self._list()
        self.hold: int | None = None  # a step that is kept besides the latest and the best

    def _list(self) -> None:
        """Looks at the disk; the same in every process, as no two look at one moment."""
        found = on_process_zero(
            lambda: {str(step): loss for step, loss in saved.listed(self.directory).items()}
        )
        self._losses = {int(step): loss for step, loss in found.items()}

    def _open_directory(self) -> None:
        if self._read_only:
            if not self.directory.is_dir():
                raise UserError(f"{self.directory}: there are no checkpoints here; check --workdir")
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".write_test_{jax.process_index()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self.directory}: cannot write here ({reason}); choose another --workdir"
            ) from error

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
          metadata: JSON values to keep with the checkpoint, such as the resolved configuration; secrets are left out.

        Returns:
          False, with a line in the log, where a checkpoint of this step is there already; it is left as it is.

        Raises:
          BadNumbers: a floating leaf is not finite; nothing was written.
          RunError: no space for this checkpoint, or the save before this one failed.
          UserError: an array of size 0.
          ValueError: a leaf that is not a jax.Array, a bad step, a reserved metadata key (the caller's mistakes).
        """
        if self._read_only:
            raise ValueError("this CheckpointStore was opened with read_only=True")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be an int of 0 or more, not {step!r}")
        metadata = dict(metadata or {})
        if reserved := sorted(set(metadata) & set(saved.OURS)):
            raise ValueError(f"metadata keys {reserved} are this module's own")
        leaves = saved.describe(state)
        nbytes = verify.check_storable(state)
        self.wait()
        if step in self.steps():
            log.warning(
                "a checkpoint of step %d is there already in %s; left as it is",
                step,
                self.directory,
            )
            return False
        words, not_finite = fingerprints(state)
        if not_finite:
            more = f" and {len(not_finite) - 1} more are" if len(not_finite) > 1 else " is"
            raise BadNumbers(
                f"{not_finite[0]}{more} not finite at step {step}, so no checkpoint of it was written; lower "
                f"config.optimizer.learning_rate and use a new --workdir ({self._resumes_from()})"
            )
        on_process_zero(lambda: self._check_space(step, nbytes))
        self._orbax.reload()  # finds nothing: its list does not know what was deleted or set aside
        loss = saved.ranking_loss(metrics)
        self._in_flight = (step, loss, nbytes)
        try:
            self._orbax.save_async(
                step,
                state,
                custom_metadata=saved.sealed(
                    metadata,
                    {name: {**leaf, "fingerprint": words[name]} for name, leaf in leaves.items()},
                    loss,
                ),
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
        """Blocks until the save in flight, if any, is committed; RunError if it failed, or is not on the disk as it should.

        Without a call that other processes must make too: `check` may find in each at another step that a save has ended.
        """
        if self._in_flight is None:
            return
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._save_failed(error) from error
        step, loss, _ = self._in_flight
        self._in_flight = None
        if is_process_zero():
            verify.check(self.directory / str(step), self._aside, self.latest_step())
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

    def rank(self, step: int, loss: float) -> None:
        """Gives the checkpoint of `step` the loss that ranks it, where it was measured after the save; stays on the disk.

        A loss that is not finite is not kept.

        Raises:
          UserError: no such step.
          RunError: it cannot be written.
        """
        if self._read_only:
            raise ValueError("this CheckpointStore was opened with read_only=True")
        path, found = self._path(step), saved.ranking_loss({"loss": loss})
        if found is None:
            return

        def write() -> None:
            try:
                saved.write_loss(path, found)
            except OSError as error:
                raise RunError(
                    f"{path}: the validation loss cannot be written here ({first_line(error)}); fix that and "
                    "run the same command again"
                ) from error

        on_process_zero(write)
        self._losses[step] = found

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved with a checkpoint: the caller's metadata, `format_version`, `versions` (package: version), `loss`,
        `leaves` ("params/w": {"dtype": "bfloat16", "shape": [3, 4], "fingerprint": "0f3a…"}) and their `digest`.

        Raises:
          UserError: no such step, or written by a newer format.
          CheckpointDamaged: it cannot be read, or is not as it was written.
        """
        return saved.read_metadata(self._path(step))

    def restore(self, step: int, abstract_state: Any, partial: bool = False) -> Any:
        """Reads the checkpoint of `step` into the structure, dtypes, shapes and shardings of `abstract_state`.

        Args:
          step: one of steps().
          abstract_state: the tree that was saved, with a jax.ShapeDtypeStruct with a sharding (or an array) for each
            leaf. The sharding may differ from the one at the time of the save, nothing else may.
          partial: `abstract_state` is a part of that tree, as nested dicts, and the rest is not read.

        Raises:
          UserError: no such step, another format, or the checkpoint has other leaves, dtypes or shapes.
          CheckpointDamaged: it is not as it was saved; in every process, also where only one can see it.
          RunError: it cannot be read now (rights, memory, the network).
          ValueError: a leaf without a sharding (Orbax would fall back on the saved devices).
        """
        return saved.restore(self._path(step), abstract_state, partial)[0]

    def restore_newest(
        self, abstract_state: Any, say: Callable[[str], None] = log.warning, partial: bool = False
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged; None where there never was one.

        Newer ones, found damaged, are then moved to `<workdir>/damaged` (not where read_only), and `say` gets a sentence for
        the person about each, in process 0. partial: as `restore`.

        Returns:
          (state, step, metadata), see `restore` and `metadata`.

        Raises:
          RunError: every checkpoint is damaged, or none is left: a run never starts from the beginning by itself.
          UserError, RunError, ValueError: as `restore`.
        """
        damaged: dict[int, str] = {}
        self.wait()
        for step in reversed(self.steps()):
            try:
                state, metadata = saved.restore(self._path(step), abstract_state, partial)
            except CheckpointDamaged as error:
                if self._read_only and not on_process_zero((self.directory / str(step)).exists):
                    self._list()  # a run beside this deleted it, and has newer ones
                    return self.restore_newest(abstract_state, say, partial)
                damaged[step] = error.reason
                continue
            for (
                bad,
                reason,
            ) in damaged.items():  # not before: what fails for all of them lies elsewhere
                done = "passed over" if self._read_only else f"moved to {self.set_aside(bad)}"
                if is_process_zero():
                    say(
                        f"{self.directory / str(bad)}: this checkpoint is damaged ({reason}); {done}, going on with an older one"
                    )
            return state, step, metadata
        if damaged:
            step, reason = max(damaged.items())
            raise RunError(
                f"{self.directory}: no checkpoint can be read as it was saved (step {step}: {reason}); "
                "fix that, or move this directory away to start from the beginning"
            )
        if aside := on_process_zero(lambda: saved.names_aside(self._aside)):
            raise RunError(
                f"{self._aside}: holds the damaged checkpoints of this run ({', '.join(aside)}) and no good one "
                "is left; move this directory away to start from the beginning"
            )
        return None

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in [s for s in self.steps() if s > step]:
            del self._losses[later]
            if is_process_zero():
                self._delete(later)

    def set_aside(self, step: int) -> str:
        """Moves a checkpoint that nobody is to go on from out of the list; returns where it is now."""
        where = on_process_zero(
            lambda: os.fspath(saved.move_aside(self.directory / str(step), self._aside))
        )
        del self._losses[step]
        return where

    def close(self) -> None:
        """Waits for the save in flight and lets Orbax go; RunError if that save failed. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._deleter.shutdown()
            with contextlib.suppress(
                Exception
            ):  # Orbax raises once more what wait() has just reported
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

    def _path(self, step: int) -> epath.Path:
        self.wait()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(
                f"{self.directory}: there is no checkpoint of step {step} (there are: {there})"
            )
        return self.directory / str(step)

    def _best_first(self) -> list[int]:
        scored = sorted((loss, -step) for step, loss in self._losses.items() if loss is not None)
        return [-negative for _, negative in scored]

    def _prune(self) -> None:
        """Deletes what is neither among the latest nor the best; called when a save is committed."""
        keep = {
            *self.steps()[-self._keep_latest :],
            *self._best_first()[: self._keep_best],
            self.hold,
        }
        for step in set(self._losses) - keep:
            del self._losses[step]
            if is_process_zero():
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Makes a step disappear at once, and its files in the background."""
        path = self.directory / str(step)
        try:
            if self._remote:  # no rename there; what has no commit file is no checkpoint
                (path / saved.COMMITTED).unlink(missing_ok=True)
            else:  # a name that Orbax cleans up when the directory is next opened
                path = path.rename(self.directory / f"{step}.orbax-checkpoint-tmp-{time.time_ns()}")
        except OSError as error:
            log.warning("%s: this old checkpoint could not be deleted (%s)", path, error)
            return
        self._deletions.append(self._deleter.submit(path.rmtree))

    def _check_space(self, step: int, nbytes: int) -> None:
        for deletion in self._deletions:
            if error := deletion.exception():  # waits for it
                log.warning(
                    "%s: an old checkpoint could not be deleted (%s)", self.directory, error
                )
        self._deletions.clear()
        if self._remote:
            return
        try:
            free = _free_bytes(self.directory)
        except OSError as error:
            raise RunError(
                f"{self.directory}: the checkpoint of step {step} cannot be written here ({error.strerror or error}); put the "
                "directory back, or start in another --workdir"
            ) from error
        if free < nbytes * SPACE_MARGIN:
            raise self._no_space(step, nbytes)

    def _no_space(self, step: int, nbytes: int) -> RunError:
        free = "unknown" if self._remote else f"{_free_bytes(self.directory):,}"
        return RunError(
            f"{self.directory}: no space for the checkpoint of step {step}: {math.ceil(nbytes * SPACE_MARGIN):,} bytes "
            f"needed, {free} free; make space and run the same command again ({self._resumes_from()})"
        )

    def _resumes_from(self) -> str:
        latest = self.latest_step()
        return (
            "no checkpoint is complete yet" if latest is None else f"it resumes from step {latest}"
        )

    def _save_failed(self, error: Exception) -> RunError:
        """Makes the store usable again after a failed save, and the error to raise."""
        assert self._in_flight is not None
        step, _, nbytes = self._in_flight
        self._in_flight = None
        if jax.process_count() == 1:  # what was written so far fills the very disk that is full
            for left in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    left.rmtree()
        if is_no_space(error):
            return self._no_space(step, nbytes)
        return RunError(
            f"{self.directory}: the checkpoint of step {step} could not be written "
            f"({first_line(error)}); fix that and run the same command again ({self._resumes_from()})"
        )


def _free_bytes(directory: epath.Path) -> int:
    return shutil.disk_usage(os.fspath(directory)).free
