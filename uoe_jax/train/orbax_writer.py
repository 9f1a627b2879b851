"""Orbax's writer of checkpoints, set up as `checkpoint` needs it, and what its errors mean."""

import errno
import logging
import os
from typing import Any, Iterator

from etils import epath
from orbax.checkpoint import v1 as ocp

log = logging.getLogger(__name__)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


def open_writer(path: epath.Path, read_only: bool, limit: int | None) -> ocp.training.Checkpointer:
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


def is_no_space(error: BaseException) -> bool:
    """Whether an error or its cause says that disk, quota or file size limit is used up."""
    # TensorStore, which writes the arrays, has the reason as text only.
    texts = [os.strerror(code) for code in _NO_SPACE]
    if getattr(error, "errno", None) in _NO_SPACE or any(text in str(error) for text in texts):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_no_space(cause)
