"""Directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from uoe_jax.errors import UserError
from uoe_jax.workdir import LiteralPath, is_remote, locate


@contextlib.contextmanager
def whole_directory(path: str, option: str) -> Iterator[epath.Path]:
    """An empty directory to write in, which gets the name `path` at the end; where anything fails nothing is left but
    the directories around it, which are made where they are missing.

    Raises:
      UserError: `path` exists, cannot be written, or is on gs://, where nothing can be renamed.
    """
    out = LiteralPath(os.path.abspath(locate(path, option)))
    if is_remote(path):
        raise UserError(
            f"{option}={path}: a directory must be renamed, which gs:// cannot; give a local one, and copy that"
        )
    if os.path.lexists(out):
        raise UserError(f"{option}={path}: exists already; remove it, or give another directory")
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{option}={path}: cannot be written ({reason}); fix that, or give another directory"
        ) from error
    finally:
        if temporary.exists():
            temporary.rmtree()
