"""Checkpoints: `<workdir>/checkpoints/<step>`, written in the background, complete or absent.

Damaged ones are moved to `<workdir>/damaged/<step>`. The list of checkpoints and their deletion are
done here, as Orbax was seen to list steps still being written or half deleted, to report a failed
save only at the next one, to fail to open for one garbled metadata file, and to let a NaN loss
displace the best checkpoint.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import math
import os
import shutil
import time
from typing import Any, Callable, Iterator, Mapping, Self

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from uoe_jax.distributed.coordination import is_process_zero, on_all, on_process_zero
from uoe_jax.errors import AGAIN, BadNumbers, ConfigError, RunError, UserError, os_error_as
from uoe_jax.train import metadata as metadata_lib
from uoe_jax.train import saved
from uoe_jax.train.metadata import CheckpointDamaged, fingerprints, first_line
from uoe_jax.workdir import checkpoint_path, is_remote

log = logging.getLogger(__name__)
SPACE_MARGIN = 1.1  # file metadata and chunk padding; the state itself hardly compresses
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointStore:
    """The checkpoints of one workdir. One writer a directory; all processes make every call.

    keep_latest, keep_best: how many stay of the newest, and of those with the lowest loss.
    read_only: changes nothing, also not what a run is writing. write_bytes: host memory for
    writing, more than the largest leaf's; None: no limit.
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
            remedy = "must be at least 1, or nothing could be resumed"
            raise ConfigError("checkpoint.keep_latest", keep_latest, remedy)
        # Absolute: Orbax refuses a relative path after it has made directories there.
        root = checkpoint_path(workdir)
        self._remote = is_remote(root)
        self.directory, self._damaged = root / "checkpoints", root / "damaged"
        self._read_only, self._keep_latest, self._keep_best = read_only, keep_latest, keep_best
        self.pinned: int | None = None  # a step that stays as well
        self._in_flight: tuple[int, float | None, int] | None = None  # step, loss, bytes of a save
        self._losses: dict[int, float | None] = {}  # of the committed steps
        self._deleter = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._deletions: list[concurrent.futures.Future[None]] = []
        on_all(self._open_directory)
        self._orbax = _open_writer(self.directory, read_only, write_bytes)
        self._read_list()

    def _read_list(self) -> None:
        """Reads which checkpoints there are; in process 0, as no two look at the same moment."""
        found = metadata_lib.list_checkpoints
        self._losses = dict(on_process_zero(lambda: [*found(self.directory).items()]))

    def _open_directory(self) -> None:
        if self._read_only:
            if not self.directory.is_dir():
                raise UserError(f"{self.directory}: there are no checkpoints here; check --workdir")
            return
        problem, remedy = f"{self.directory}: cannot write here", "choose another --workdir"
        with os_error_as(UserError, problem, remedy):
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".write_test_{jax.process_index()}"
            probe.write_bytes(b"")
            probe.unlink()

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> bool:
        """Starts to write a tree of jax.Array as the checkpoint of `step`; waits for the last save.

        Returns once the buffers are copied and may be donated; False, with a warning, where there
        is a checkpoint of this step already. A finite metrics["loss"] makes it a candidate for the
        best. metadata: JSON values to keep; secrets are left out.
        """
        if self._read_only:
            raise ValueError("this CheckpointStore was opened with read_only=True")
        if type(step) is not int or step < 0:
            raise ValueError(f"step must be an int of 0 or more, not {step!r}")
        metadata = dict(metadata or {})
        if reserved := sorted(set(metadata) & set(metadata_lib.RESERVED)):
            raise ValueError(f"metadata keys {reserved} are this module's own")
        nbytes = saved.check_storable(state)
        leaves = metadata_lib.describe(state)
        self.wait()
        if step in self.steps():
            log.warning("%s: holds a checkpoint of step %d already", self.directory, step)
            return False
        words, not_finite = fingerprints(state)
        if not_finite:
            more = f" and {len(not_finite) - 1} more are" if len(not_finite) > 1 else " is"
            problem = f"{not_finite[0]}{more} not finite at step {step}"
            remedy = "lower config.optimizer.learning_rate and use a new --workdir"
            result = f"so no checkpoint of it was written; {remedy} ({self._resumes_from()})"
            raise BadNumbers(f"{problem}, {result}")
        on_process_zero(lambda: self._check_space(step, nbytes))
        self._orbax.reload()  # empties its list, which does not know of our deletions
        found = float((metrics or {}).get("loss", math.nan))
        loss = found if math.isfinite(found) else None
        leaves = {name: {**leaf, "fingerprint": words[name]} for name, leaf in leaves.items()}
        content = metadata_lib.sealed(metadata, leaves, loss)
        self._in_flight = (step, loss, nbytes)
        try:
            # force: Orbax's own policy would save as often as it can.
            self._orbax.save_async(step, state, custom_metadata=content, force=True)
        except Exception as error:
            raise self._save_failed(error) from error
        return True

    def check(self) -> None:
        """RunError if a save failed in the background; does not wait: call it at every step."""
        if self._in_flight is not None and not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in flight is verified; RunError if it failed.

        Makes no call that waits for other processes: with `check`, steps at which they call differ.
        """
        if self._in_flight is None:
            return
        try:
            self._orbax.wait()
        except Exception as error:
            raise self._save_failed(error) from error
        (step, loss, _), self._in_flight = self._in_flight, None
        if is_process_zero():
            saved.check(self.directory / str(step), self._damaged, self.latest_step())
        self._losses[step] = loss
        latest, best = self.steps()[-self._keep_latest :], self._by_loss()[: self._keep_best]
        for old in self._losses.keys() - {*latest, *best, self.pinned}:
            self._delete(old)

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending, once wait() or check() saw them end."""
        return sorted(self._losses)

    def latest_step(self, most: float = math.inf) -> int | None:
        """The newest committed step, of `most` or earlier; None without one."""
        return max((step for step in self._losses if step <= most), default=None)

    def best_step(self) -> int | None:
        """The committed step with the lowest loss, the newest of equals; None without a loss."""
        return next(iter(self._by_loss()), None)

    def rank(self, step: int, loss: float) -> None:
        """Stores the loss of the checkpoint of `step`, measured later; ignores one not finite."""
        if self._read_only:
            raise ValueError("this CheckpointStore was opened with read_only=True")
        path = self._path(step)
        if math.isfinite(loss):
            problem = f"{path}: the validation loss cannot be written here"
            write = os_error_as(RunError, problem, AGAIN)(metadata_lib.write_loss)
            on_process_zero(lambda: write(path, loss))
            self._losses[step] = loss

    def restore(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """Reads the checkpoint of `step` into the structure and shardings of `abstract`.

        `abstract` is the tree that was saved, of jax.ShapeDtypeStruct, or (`partial`) a part of it
        as nested dicts. Raises, in every process, CheckpointDamaged where it is not as it was
        saved, and RunError where it cannot be read now (rights, memory, the network).
        """
        return saved.restore(self._path(step), abstract, partial)[0]

    def restore_newest(
        self, abstract: Any, report: Callable[[str], None] = log.warning, partial: bool = False
    ) -> tuple[Any, int, dict[str, Any]] | None:
        """(State, step, metadata) of the newest good checkpoint; None where there never was one.

        Newer damaged ones are then moved to `<workdir>/damaged` (not where read_only), and `report`
        is called with a sentence about each, in process 0. Arguments and errors as of `restore`.
        RunError where all are damaged: a run never starts from the beginning by itself.
        """
        damaged: dict[int, str] = {}
        self.wait()
        for step in reversed(self.steps()):
            try:
                state, metadata = saved.restore(self._path(step), abstract, partial)
            except CheckpointDamaged as error:
                if self._read_only and not on_process_zero((self.directory / str(step)).exists):
                    self._read_list()  # the run itself deleted it, and has newer ones
                    return self.restore_newest(abstract, report, partial)
                damaged[step] = error.reason
                continue
            # Only now: a fault of all checkpoints has another reason.
            for bad, reason in damaged.items():
                path, done = self.directory / str(bad), "passed over"
                if not self._read_only:
                    move = functools.partial(metadata_lib.quarantine, path, self._damaged)
                    done = f"moved to {on_process_zero(move)}"
                    del self._losses[bad]
                if is_process_zero():
                    damage = f"this checkpoint is damaged ({reason}); {done}"
                    report(f"{path}: {damage}, going on with an older one")
            return state, step, metadata
        if damaged:
            step, reason = max(damaged.items())
            problem = f"no checkpoint can be read as it was saved (step {step}: {reason})"
            remedy = "fix that, or move this directory away to start from the beginning"
            raise RunError(f"{self.directory}: {problem}; {remedy}")
        if aside := on_process_zero(lambda: metadata_lib.quarantined(self._damaged)):
            problem = f"holds the damaged checkpoints of this run ({', '.join(aside)})"
            remedy = "move this directory away to start from the beginning"
            raise RunError(f"{self._damaged}: {problem} and no good one is left; {remedy}")
        return None

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in [s for s in self.steps() if s > step]:
            self._delete(later)

    def close(self) -> None:
        """Waits for the save in flight and closes; RunError if it failed. Safe to call twice."""
        try:
            self.wait()
        finally:
            self._deleter.shutdown()
            with contextlib.suppress(Exception):  # Orbax raises what wait() has just reported
                self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except RunError as error:
            if kind is None:
                raise
            log.error("%s", error)  # the error under way matters more

    def _path(self, step: int) -> epath.Path:
        self.wait()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            problem = f"there is no checkpoint of step {step} (there are: {there})"
            raise UserError(f"{self.directory}: {problem}")
        return self.directory / str(step)

    def _by_loss(self) -> list[int]:
        ranked = [(loss, -step) for step, loss in self._losses.items() if loss is not None]
        return [-negative for _, negative in sorted(ranked)]

    def _delete(self, step: int) -> None:
        """Removes a step from the list at once, and its files in the background in process 0."""
        del self._losses[step]
        if not is_process_zero():
            return
        path = self.directory / str(step)
        try:
            if self._remote:  # no rename there; without its commit file it is no checkpoint
                (path / metadata_lib.COMMITTED).unlink(missing_ok=True)
            else:  # a name that Orbax cleans up when the directory is next opened
                path = path.rename(self.directory / f"{step}.orbax-checkpoint-tmp-{time.time_ns()}")
        except OSError as error:
            log.warning("%s: this old checkpoint could not be deleted (%s)", path, error)
            return
        self._deletions.append(self._deleter.submit(path.rmtree))

    def _check_space(self, step: int, nbytes: int) -> None:
        while self._deletions:
            if error := self._deletions.pop(0).exception():  # waits for it
                message = "%s: an old checkpoint could not be deleted (%s)"
                log.warning(message, self.directory, error)
        problem = f"{self.directory}: the checkpoint of step {step} cannot be written here"
        remedy = "put the directory back, or start in another --workdir"
        with os_error_as(RunError, problem, remedy):
            if not self._remote and _free_bytes(self.directory) < nbytes * SPACE_MARGIN:
                raise self._no_space(step, nbytes)

    def _no_space(self, step: int, nbytes: int) -> RunError:
        free = "unknown" if self._remote else f"{_free_bytes(self.directory):,}"
        needed = f"{math.ceil(nbytes * SPACE_MARGIN):,} bytes needed, {free} free"
        remedy = f"make space and run the same command again ({self._resumes_from()})"
        problem = f"no space for the checkpoint of step {step}: {needed}"
        return RunError(f"{self.directory}: {problem}; {remedy}")

    def _resumes_from(self) -> str:
        latest = self.latest_step()
        none = "no checkpoint is complete yet"
        return none if latest is None else f"it resumes from step {latest}"

    def _save_failed(self, error: Exception) -> RunError:
        """Makes the store usable again; returns the error to raise."""
        assert self._in_flight is not None
        (step, _, nbytes), self._in_flight = self._in_flight, None
        if jax.process_count() == 1:  # the partial checkpoint may be what fills the disk
            for left in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    left.rmtree()
        if _is_no_space(error):
            return self._no_space(step, nbytes)
        problem = f"the checkpoint of step {step} could not be written ({first_line(error)})"
        return RunError(f"{self.directory}: {problem}; {AGAIN} ({self._resumes_from()})")


def _free_bytes(directory: epath.Path) -> int:
    return shutil.disk_usage(os.fspath(directory)).free


def _drop_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """Drops the thousand log lines of a failed save, which Orbax then raises as well."""
    from_orbax = record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname
    return log.isEnabledFor(logging.DEBUG) or not from_orbax


class _Unlisted:
    """Step names for Orbax that find nothing on the disk."""

    build_name = staticmethod(str)

    def find_all(self, _: object) -> Iterator[Any]:
        return iter(())

    def find_step(self, _: object, step: int) -> Any:
        raise ValueError(f"no step {step} is looked for")


def _open_writer(path: epath.Path, read_only: bool, limit: int | None) -> ocp.training.Checkpointer:
    """Orbax's writer for a directory; it deletes nothing. limit: bytes of host memory."""
    logging.getLogger("absl").addFilter(_drop_orbax_tracebacks)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = limit
    with context:
        writer = ocp.training.Checkpointer(
            path,
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),
            step_name_format=_Unlisted(),
            cleanup_tmp_directories=not read_only,  # left where a process was killed in a save
        )
    # In every save Orbax asks JAX, with the step, whether to stop. JAX expects ascending numbers in
    # such calls, so that `coordination.preempted`, which has its own, missed a SIGTERM in a save.
    writer._manager.reached_preemption = lambda step: False
    return writer


def _is_no_space(error: BaseException) -> bool:
    """Whether an error or its cause says that disk, quota or file size limit is used up."""
    # TensorStore, which writes the arrays, has the reason as text only.
    texts = [os.strerror(code) for code in _NO_SPACE]
    if getattr(error, "errno", None) in _NO_SPACE or any(text in str(error) for text in texts):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _is_no_space(cause)
