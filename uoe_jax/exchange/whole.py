"""Directories that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from uoe_jax.errors import UserError, os_error_as
from uoe_jax.workdir import LiteralPath, is_remote, locate


@contextlib.contextmanager
def whole_directory(path: str, option: str) -> Iterator[epath.Path]:
    """An empty directory to write in, renamed to `path` at the end; removed where anything fails.

    Missing directories around it are made, and stay.

    Raises:
      UserError: `path` exists, cannot be written, or is on gs://, where nothing can be renamed.
    """
    out = LiteralPath(os.path.abspath(locate(path, option)))
    if is_remote(path):
        why = "a directory must be renamed, which gs:// cannot"
        raise UserError(f"{option}={path}: {why}; give a local one, and copy that")
    if os.path.lexists(out):
        raise UserError(f"{option}={path}: exists already; remove it, or give another directory")
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    problem, remedy = f"{option}={path}: cannot be written", "fix that, or give another directory"
    try:
        with os_error_as(UserError, problem, remedy):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(out)
    finally:
        if temporary.exists():
            temporary.rmtree()
