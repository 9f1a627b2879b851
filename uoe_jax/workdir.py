"""The directory of a run: whose it is, who writes there, and the configuration and record stored in it. Imports no jax.

A workdir is a local directory or `gs://bucket/name`. There are only objects there, written whole or not at all: nothing
can be locked, renamed, appended to or measured for free space. What a run does without for that it says when it starts.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import fnmatch
import importlib.util
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from etils.epath import gpath

from uoe_jax.config.schema import Config, changed_keys, from_dict, printable, to_dict
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError
from uoe_jax.runtime_env import expanded

CONFIG, RECORD, LOCK = "config.json", "record.json", ".lock"
SHOWS_UP_S = 10  # a network file system may show a new file late
_NO_RUN_YET = re.compile(
    r"\.lock|error(_\d+)?\.txt|\.(config|record)\.json\.\d+"
)  # what a start that failed may leave
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_locks: dict[str, int] = {}  # workdir: file descriptor


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address like gs://bucket/name."""
    return "://" in os.fspath(path)


class LiteralPath(gpath.PosixGPath):
    """A path, local or gs://, that is always taken as it is written.

    The `glob` of etils takes `fold[1]` in the name of the directory itself for a pattern. Orbax searches a checkpoint
    with it: there it would miss the files of that directory, or find those of another one. Orbax keeps the class of a
    path that it is given.
    """

    def glob(self, pattern: str) -> Iterator[LiteralPath]:
        """The paths below this one whose names match the pattern's, part by part."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else (path,)


def locate(path: str | os.PathLike[str], option: str = "--workdir") -> LiteralPath:
    """The path of a workdir; touches nothing. option: where it was given, for errors.

    Raises:
      UserError: an address that is not gs://, or what reads and writes gs:// is not installed.
    """
    name = os.fspath(path)
    if is_remote(name):
        if not re.match(r"gs://[^/]", name):
            raise UserError(
                f"{option}={name}: is neither a local directory nor gs://bucket/name; give one of these"
            )
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(
                f"{option}={name}: gs:// takes the package gcsfs; pip install 'uoe-jax[gs]'"
            )
        import fsspec

        # Listings are cached for ever by default, and would not show what TensorStore and other processes write.
        fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    found = LiteralPath(expanded(name, option))
    if is_remote(found) and not is_remote(name):
        raise UserError(
            f"{option}={printable(name)}: is taken for the address {found}; give that, or a directory elsewhere"
        )
    return found


def checkpoint_path(path: str | os.PathLike[str], option: str = "--workdir") -> LiteralPath:
    """The absolute path of a directory below which checkpoints are written or read; touches nothing.

    It is the path without its symbolic links where only that can be used.

    Raises:
      UserError: as `locate`, or the path holds what the writer of checkpoints does not take as it is written.
    """
    name = os.fspath(locate(path, option))
    try:
        names = [name] if is_remote(name) else [os.path.abspath(name), os.path.realpath(name)]
    except FileNotFoundError as error:
        raise UserError(
            f"{option}={name}: the current directory is gone; give a whole path, or start elsewhere"
        ) from error
    for name in names:
        if not (bad := _unusable_in(name)):
            return LiteralPath(name)
    raise UserError(
        f"{option}={printable(os.fspath(path))}: the path {printable(name)} holds {bad}, and no checkpoint can be "
        "written or read below such a name; give a directory whose whole path is without it"
    )


def _unusable_in(name: str) -> str:
    """What Orbax, TensorStore or the client of gs:// would take for something else in a path; "" where there is nothing.

    TensorStore makes `/` of a backslash in a local path, and Orbax `gs://` of `gs:/`. A gs:// path is part of a URL,
    which ends at `?` or `#`; its client takes `*`, `?` and `[` for a pattern when it deletes.
    """
    rest = name.partition("://")[2] if is_remote(name) else name
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "bytes that are not UTF-8"
    if "gs:/" in f"{rest}/":
        return "'gs:' at the end of a directory's name"
    if not is_remote(name):
        what = LiteralPath(name)  # of etils: /gs/bucket is gs://bucket to it
        return (
            "a backslash"
            if "\\" in rest
            else f"what is taken for {what}"
            if is_remote(what)
            else ""
        )
    if ".." in rest.split("/"):
        return "'..'"
    if control := next((c for c in rest if ord(c) < 32 or ord(c) == 127), ""):
        return f"the control character {control!r}"
    return next((repr(c) for c in rest if c in "*?[#"), "")


@contextlib.contextmanager
def os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """The clients of gs:// raise exceptions of a dozen kinds; here they are OSError of one line, as a file system's are."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise OSError(kind + ": ".join(str(error).splitlines())) from error


def open_workdir(path: str, config: Config) -> epath.Path:
    """Makes or enters a workdir, locks it and stores the resolved configuration; returns its path, absolute.

    The lock is this process's until `release` or its end, however it ends; one line says so where there is none.

    Raises:
      UserError: it holds something else or another run, another process writes there, or it cannot be written.
    """
    workdir = checkpoint_path(path)
    try:
        with os_errors(path):
            if not is_remote(path):  # there, it would make a bucket of a mistyped name
                workdir.mkdir(parents=True, exist_ok=True)
            there = _names(workdir)
            if there and CONFIG not in there:
                raise UserError(
                    f"--workdir={path}: holds other files ({there[0]}, …) and no run; give an empty directory"
                )
            lock(path, workdir)
            if CONFIG in _names(workdir):
                _refuse_other_run(path, read_config(path), config)
            write_json(workdir / CONFIG, to_dict(config))
    except OSError as error:
        raise UserError(
            f"--workdir={path}: cannot be written ({error.strerror or error}); give a directory you may write to"
        ) from error
    return workdir


def _names(workdir: epath.Path) -> list[str]:
    """What is in a workdir, but for the leavings of a start that failed."""
    try:
        return sorted(p.name for p in workdir.iterdir() if not _NO_RUN_YET.fullmatch(p.name))
    except FileNotFoundError:  # gs:// has no empty directories
        return []


def lock(path: str, workdir: epath.Path) -> None:
    """Makes this process the only one that writes to a workdir, or says that nothing keeps others out.

    Raises:
      UserError: another process writes there.
    """
    if is_remote(path):
        print(f"uoe: {path}: no lock against a second writer, no check of free space; metrics.jsonl is uploaded once a minute "
              "and at checkpoints", file=sys.stderr, flush=True)  # fmt: skip
        return
    file, held = workdir / LOCK, _locks.get(os.fspath(workdir))
    if held is not None and file.exists() and os.path.samestat(os.fstat(held), os.stat(file)):
        return
    release(workdir)  # of a directory that was deleted or moved since
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        try:
            if isinstance(error, BlockingIOError):
                raise UserError(
                    f"--workdir={path}: {_holder(lock)}; stop it, or give another --workdir"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            print(f"uoe: {path}: nothing keeps a second writer out, as this file system has no locks ({error.strerror})",
                  file=sys.stderr, flush=True)  # fmt: skip
        finally:
            os.close(lock)
        return
    _locks[os.fspath(workdir)] = lock
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    os.ftruncate(lock, 0)
    os.pwrite(
        lock,
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(),
        0,
    )


def wait_for_writer(workdir: epath.Path, seconds: float, given_up: Callable[[], bool]) -> None:
    """Waits until no process writes to a local workdir, so long at most or until it is given up."""
    if is_remote(workdir) or not (workdir / LOCK).exists():
        return
    said, until = False, time.monotonic() + seconds
    with open(workdir / LOCK, "rb") as file:
        while time.monotonic() < until and not given_up():
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not said:
                    print(
                        f"uoe: {workdir}: {_holder(file.fileno())}; waiting for it",
                        file=sys.stderr,
                        flush=True,
                    )
                said = True
                time.sleep(0.2)
            except OSError:  # no locks here
                return


def _holder(lock: int) -> str:
    """Who holds a lock, from what it wrote into the file."""
    try:
        said = json.loads(os.pread(lock, 1000, 0))
        return (
            f"process {said['pid']} on {said['host']} has been writing there since {said['since']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is writing there"


def release(workdir: str | os.PathLike[str]) -> None:
    """Lets other processes write to a workdir again; does nothing where this process has no lock on it."""
    lock = _locks.pop(os.fspath(workdir), None)
    if lock is not None:
        os.close(lock)


def _forget_locks() -> None:
    """A forked child shares its parent's locks, and would keep them after the parent's end; closing is not unlocking."""
    while _locks:
        os.close(_locks.popitem()[1])


os.register_at_fork(after_in_child=_forget_locks)


def enter_workdir(path: str, config: Config) -> epath.Path:
    """`open_workdir` by process 0; the same directory, absolute, in every process.

    Raises:
      UserError: as `open_workdir`, or another process does not see what process 0 wrote there.
    """

    def opened() -> list[str]:
        workdir = open_workdir(path, config)
        return [os.fspath(workdir), read_text(workdir / CONFIG)]

    name, written = coordination.on_process_zero(opened)
    workdir = locate(name)

    def seen() -> None:
        patience = time.monotonic() + SHOWS_UP_S
        while not ((workdir / CONFIG).exists() and read_text(workdir / CONFIG) == written):
            if time.monotonic() > patience:
                raise UserError(
                    f"--workdir={path}: this process does not find in {name} what process 0 wrote there; give a directory "
                    "that all machines share"
                )
            time.sleep(0.1)

    coordination.on_all(seen)
    return workdir


def _refuse_other_run(path: str, old: Config, new: Config) -> None:
    changed = changed_keys(old, new)
    if changed:
        name, before, now = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise UserError(
            f"config.{name}={now!r}: the run in {path} was started with {before!r}{more}; "
            "give the old value, or another --workdir"
        )


def check_record(workdir: epath.PathLike, record: dict[str, Any], store: bool = True) -> None:
    """Stores what the run's data are (not where `store` is false), or where that is known refuses data that are not the same.

    Raises:
      UserError: the content hash of the data differs from the stored one, or the file cannot be read or written.
    """
    path = locate(workdir) / RECORD
    with os_errors(path):
        found = read_json(
            path, "remove it, where you are sure of the run's data, or start in another --workdir"
        )
        if found is None and not store:
            return
        if found is None:
            try:
                return write_json(path, {"data": record})
            except OSError as error:
                raise UserError(
                    f"{path}: cannot be written ({error.strerror or error}); fix that and run again"
                ) from error
    old = found.get("data")
    for name in ("sha256", "tokenizer"):
        if not isinstance(old, dict) or old.get(name) != record.get(name):
            was = old.get(name) if isinstance(old, dict) else "something unknown"
            raise UserError(
                f"data.{name}={record.get(name)!r}: the run in {workdir} was trained on {was!r}; "
                "use the data it was started with (of the standard library: the same interpreter), or another --workdir"
            )


def read_config(path: str) -> Config:
    """The resolved configuration of the run in a workdir.

    Raises:
      UserError: there is no run, or its config.json cannot be used.
    """
    file = locate(path) / CONFIG
    remedy = "restore it, or start in another --workdir"
    values = read_json(file, remedy)
    if values is None:
        raise UserError(
            f"--workdir={path}: no run there (config.json is missing); train one with uoe train"
        )
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{file}: cannot be used ({error}); {remedy}") from error


def read_json(file: epath.Path, remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file; UserError with the remedy where it cannot be read."""
    try:
        with os_errors(file):
            found = json.loads(read_text(file), object_pairs_hook=_unique)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read ({reason}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: cannot be read (it holds no JSON object); {remedy}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; ValueError where a key stands twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(
            f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice"
        )
    return found


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_out(name: str, text: str) -> None:
    """Writes the file that a person named with --out, whole or not at all; UserError where that fails."""
    try:
        with os_errors(name):
            write_text(locate(name, "--out"), text)
    except OSError as error:
        raise UserError(
            f"--out={name}: cannot be written ({error.strerror or error}); give another file"
        ) from error


def read_text(path: epath.PathLike) -> str:
    """The text of a file in UTF-8, without a byte-order mark; ends of lines stay as they are."""
    # As text, epath heeds no encoding: it keeps the mark, and reads gs:// by the locale.
    return epath.Path(path).read_bytes().decode("utf-8-sig")


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file in UTF-8 whole or not at all."""
    path, data = LiteralPath(path), text.encode()
    if is_remote(path):
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may leave an empty file under the final name
    temporary.replace(path)
