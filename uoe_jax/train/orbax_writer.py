"""Orbax's writer of checkpoints, set up as `checkpoint` needs it, and what its errors mean."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.checkpoint_manager import CheckpointManager

log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _drop_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """Orbax logs a failed save a dozen times over, a thousand lines in all, and then raises it: that is enough."""
    return log.isEnabledFor(logging.DEBUG) or not (
        record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname
    )


class _Unlisted:
    """Step names for Orbax that find nothing on the disk."""

    build_name = staticmethod(str)

    def find_all(self, _: object) -> Iterator[Any]:
        return iter(())

    def find_step(self, _: object, step: int) -> Any:
        raise ValueError(f"no step {step} is looked for")


def open_writer(
    directory: epath.Path, read_only: bool, write_bytes: int | None
) -> ocp.training.Checkpointer:
    """Orbax's checkpointer for a directory, which must exist; arguments as of CheckpointStore."""
    logging.getLogger("absl").addFilter(_drop_orbax_tracebacks)
    # Orbax asks JAX in every save, with the step, whether to stop. JAX expects such questions to count up, and takes the answer for
    # given: a SIGTERM in a save was then passed over by `processes.preempted`, which asks the same with its own numbers.
    CheckpointManager.reached_preemption = lambda self, step: False
    context = ocp.Context()
    context.memory.write_concurrent_bytes = write_bytes
    with context:
        return ocp.training.Checkpointer(
            directory,
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # the store decides
            step_name_format=_Unlisted(),
            # A process killed while it saved or deleted leaves `*.orbax-checkpoint-tmp*`, which nobody else removes.
            cleanup_tmp_directories=not read_only,
        )


def is_no_space(error: BaseException) -> bool:
    """Whether an error or one it came from says that the disk, the quota or the file size limit is used up. The writer
    of the arrays (TensorStore) gives the reason as text only."""
    link: BaseException | None = error
    while link is not None:
        if getattr(link, "errno", None) in _NO_SPACE or any(
            os.strerror(code) in str(link) for code in _NO_SPACE
        ):
            return True
        link = link.__cause__ or link.__context__
    return False
