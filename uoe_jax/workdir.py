"""The directory of a run: its lock, its configuration and the record of its data. Imports no jax.

A workdir is a local directory or `gs://bucket/name`, where objects are written whole or not at all
and cannot be locked, renamed, appended to or measured for free space.
"""

import contextlib
import errno
import fcntl
import fnmatch
import functools
import importlib.util
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from etils.epath import gpath

from uoe_jax.config.fields import printable
from uoe_jax.config.load import changed_keys, from_dict, to_dict
from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError, os_error_as, reason
from uoe_jax.runtime_env import expanded, notice

CONFIG, RECORD, LOCK = "config.json", "record.json", ".lock"
SHOWS_UP_S = 10  # a network file system may show a new file late
_LEFTOVERS = re.compile(r"\.lock|error(_\d+)?\.txt|\.(config|record)\.json\.\d+")  # failed start
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_locks: dict[str, int] = {}  # workdir: file descriptor


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address like gs://bucket/name."""
    return "://" in os.fspath(path)


class LiteralPath(gpath.PosixGPath):
    """A path, local or gs://, whose own name is never read as a pattern.

    The `glob` of etils takes `fold[1]` in the directory's own name for one: Orbax, which searches
    checkpoints with it and keeps the class of a path, would miss files or find those of another.
    """

    def glob(self, pattern: str) -> "Iterator[LiteralPath]":
        first, _, rest = pattern.partition("/")
        for path in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else (path,)


def locate(path: str | os.PathLike[str], option: str = "--workdir") -> LiteralPath:
    """The path of a workdir, as `option` gave it; touches nothing. UserError if it is none."""
    name = os.fspath(path)
    if is_remote(name):
        if not re.match(r"gs://[^/]", name):
            problem = "is neither a local directory nor gs://bucket/name; give one of these"
            raise UserError(f"{option}={name}: {problem}")
        if importlib.util.find_spec("gcsfs") is None:
            remedy = "gs:// takes the package gcsfs; pip install 'uoe-jax[gs]'"
            raise UserError(f"{option}={name}: {remedy}")
        import fsspec

        # By default listings are cached for ever, and miss what other processes write.
        fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    found = LiteralPath(expanded(name, option))
    if is_remote(found) and not is_remote(name):
        problem = f"is taken for the address {found}; give that, or a directory elsewhere"
        raise UserError(f"{option}={printable(name)}: {problem}")
    return found


def checkpoint_path(path: str | os.PathLike[str], option: str = "--workdir") -> LiteralPath:
    """The absolute path of a directory for checkpoints; touches nothing.

    Links are resolved where only that can be used. UserError where Orbax would misread the path.
    """
    name = os.fspath(locate(path, option))
    try:
        names = [name] if is_remote(name) else [os.path.abspath(name), os.path.realpath(name)]
    except FileNotFoundError as error:
        problem = "the current directory is gone; give a whole path, or start elsewhere"
        raise UserError(f"{option}={name}: {problem}") from error
    for name in names:
        if not (bad := _unusable_in(name)):
            return LiteralPath(name)
    problem = f"the path {printable(name)} holds {bad}, and no checkpoint can be written or read"
    remedy = "below such a name; give a directory whose whole path is without it"
    raise UserError(f"{option}={printable(os.fspath(path))}: {problem} {remedy}")


def _unusable_in(name: str) -> str:
    """What Orbax, TensorStore or the client of gs:// would misread in a path; "" for nothing."""
    rest = name.partition("://")[2] if is_remote(name) else name
    try:
        name.encode()
    except UnicodeEncodeError:
        return "bytes that are not UTF-8"
    if "gs:/" in f"{rest}/":  # Orbax reads it as gs://
        return "'gs:' at the end of a directory's name"
    if not is_remote(name):
        seen = LiteralPath(name)  # etils reads /gs/bucket as gs://bucket
        remote = f"what is taken for {seen}" if is_remote(seen) else ""
        return "a backslash" if "\\" in rest else remote  # TensorStore reads a backslash as /
    if ".." in rest.split("/"):
        return "'..'"
    if control := next((c for c in rest if ord(c) < 32 or ord(c) == 127), ""):
        return f"the control character {control!r}"
    return next((repr(c) for c in rest if c in "*?[#"), "")  # patterns, or the end of a URL


def open_workdir(path: str, config: Config) -> epath.Path:
    """Creates or enters a workdir, locks it, stores the configuration; UserError if impossible."""
    workdir, remedy = checkpoint_path(path), "give a directory you may write to"
    with os_error_as(UserError, f"--workdir={path}: cannot be written", remedy), os_errors(path):
        if not is_remote(path):  # there, it would create a bucket of a mistyped name
            workdir.mkdir(parents=True, exist_ok=True)
        there = _names(workdir)
        if there and CONFIG not in there:
            problem = f"holds other files ({there[0]}, …) and no run; give an empty directory"
            raise UserError(f"--workdir={path}: {problem}")
        lock(path, workdir)
        if CONFIG in _names(workdir):
            _refuse_other_run(path, read_config(path), config)
        write_json(workdir / CONFIG, to_dict(config))
    return workdir


def _names(workdir: epath.Path) -> list[str]:
    """What is in a workdir, except what a failed start left."""
    try:
        return sorted(p.name for p in workdir.iterdir() if not _LEFTOVERS.fullmatch(p.name))
    except FileNotFoundError:  # gs:// has no empty directories
        return []


def enter_workdir(path: str, config: Config) -> epath.Path:
    """`open_workdir` by process 0; UserError where another process does not see what it wrote."""

    def opened() -> list[str]:
        workdir = open_workdir(path, config)
        return [os.fspath(workdir), read_text(workdir / CONFIG)]

    name, written = coordination.on_process_zero(opened)
    workdir = locate(name)

    def check_visible() -> None:
        deadline = time.monotonic() + SHOWS_UP_S
        while not ((workdir / CONFIG).exists() and read_text(workdir / CONFIG) == written):
            if time.monotonic() > deadline:
                problem = f"this process does not find in {name} what process 0 wrote there"
                remedy = "give a directory that all machines share"
                raise UserError(f"--workdir={path}: {problem}; {remedy}")
            time.sleep(0.1)

    coordination.on_all(check_visible)
    return workdir


def _refuse_other_run(path: str, old: Config, new: Config) -> None:
    """UserError where keys differ that may not change in a run; names all of them."""
    if not (changed := changed_keys(old, new)):
        return
    given = ", ".join(f"config.{key}={now!r}" for key, _, now in changed)
    before = ", ".join(repr(value) for _, value, _ in changed)
    remedy = _elsewhere(path)
    if "train.steps" in (key for key, *_ in changed):
        same = f"--config.optimizer.decay_steps={old.decay_steps}"
        remedy += f"; with {same} the schedule stays, and train.steps may change"
    values = "the old value" if len(changed) == 1 else "the old values"
    problem = f"the run in {path} was started with {before}"
    raise UserError(f"{given}: {problem}; give {values}, or {remedy}")


def _elsewhere(path: str) -> str:
    option = f"--config.train.init_from={shlex.quote(path)}"
    return f"continue from its weights in another --workdir with {option}"


def check_record(workdir: epath.PathLike, record: dict[str, Any], store: bool = True) -> None:
    """Refuses data that are not those of the run's record; `store`: writes a missing record."""
    path = locate(workdir) / RECORD
    remedy = "remove it, where you are sure of the run's data, or start in another --workdir"
    found = read_json(path, remedy)
    if found is None:
        if store:
            problem, remedy = f"{path}: cannot be written", "fix that and run again"
            with os_error_as(UserError, problem, remedy), os_errors(path):
                write_json(path, {"data": record})
        return
    old = found["data"] if isinstance(found.get("data"), dict) else {}
    for name in ("sha256", "tokenizer"):
        if old.get(name) != (new := record.get(name)):
            before = f"the run in {workdir} was trained on {old.get(name, 'something unknown')!r}"
            use = "use the data it was started with (of the standard library: the same interpreter)"
            more = f", or {_elsewhere(os.fspath(workdir))}" if store else ""
            raise UserError(f"data.{name}={new!r}: {before}; {use}{more}")


def read_config(path: str) -> Config:
    """The configuration of the run in a workdir; UserError for no run or a bad config.json."""
    file, remedy = locate(path) / CONFIG, "restore it, or start in another --workdir"
    values = read_json(file, remedy)
    if values is None:
        problem = "no run there (config.json is missing); train one with uoe train"
        raise UserError(f"--workdir={path}: {problem}")
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{file}: cannot be used ({error}); {remedy}") from error


def lock(path: str, workdir: epath.Path) -> None:
    """Makes this process the only writer, or says why it cannot; UserError if there is another."""
    if is_remote(path):
        uploads = "metrics.jsonl is uploaded once a minute and at checkpoints"
        return notice(f"{path}: no lock against a second writer, no check of free space; {uploads}")
    file, held = workdir / LOCK, _locks.get(os.fspath(workdir))
    if held is not None and file.exists() and os.path.samestat(os.fstat(held), os.stat(file)):
        return
    release(workdir)  # of a directory that was deleted or moved since
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(lock)
        os.close(lock)
        if isinstance(error, BlockingIOError):
            remedy = "stop it, or give another --workdir"
            raise UserError(f"--workdir={path}: {holder}; {remedy}") from error
        if error.errno not in _NO_LOCKS:
            raise
        why = f"this file system has no locks ({error.strerror})"
        return notice(f"{path}: nothing keeps a second writer out, as {why}")
    _locks[os.fspath(workdir)] = lock
    _release_in_children()
    us = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T%z")}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(us).encode(), 0)


def wait_for_writer(workdir: epath.Path, seconds: float, cancelled: Callable[[], bool]) -> None:
    """Waits until no process writes to a local workdir, for at most so long or until cancelled."""
    if is_remote(workdir) or not (workdir / LOCK).exists():
        return
    noticed, deadline = False, time.monotonic() + seconds
    with open(workdir / LOCK, "rb") as file:
        while time.monotonic() < deadline and not cancelled():
            try:
                return fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not noticed:
                    notice(f"{workdir}: {_holder(file.fileno())}; waiting for it")
                noticed = True
                time.sleep(0.2)
            except OSError:  # no locks here
                return


def _holder(lock: int) -> str:
    """Who holds a lock, from what it wrote into the file."""
    try:
        who = json.loads(os.pread(lock, 1000, 0))
        return "process {pid} on {host} has been writing there since {since}".format(**who)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process is writing there"


def release(workdir: str | os.PathLike[str]) -> None:
    """Gives up this process's lock on a workdir, if it has one."""
    lock = _locks.pop(os.fspath(workdir), None)
    if lock is not None:
        os.close(lock)


@functools.cache
def _release_in_children() -> None:
    """Lets forked children close their copies of the locks, which would outlive the parent."""

    def forget() -> None:
        for workdir in list(_locks):
            release(workdir)

    os.register_at_fork(after_in_child=forget)


@contextlib.contextmanager
def os_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the many exceptions of the clients of gs:// into OSError with one line of text."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise OSError(kind + ": ".join(str(error).splitlines())) from error


def read_json(file: epath.Path, remedy: str) -> dict[str, Any] | None:
    """The object in a JSON file, None for no file; UserError with the remedy if unreadable."""
    try:
        with os_errors(file):
            found = json.loads(read_text(file), object_pairs_hook=_unique)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: cannot be read (it holds no JSON object); {remedy}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; ValueError for a repeated key, where Python takes the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands there twice")
    return found


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_out(name: str, text: str) -> None:
    """Writes the file of --out, whole or not at all; UserError where that fails."""
    with os_error_as(UserError, f"--out={name}: cannot be written", "give another file"):
        with os_errors(name):
            write_text(locate(name, "--out"), text)


def read_text(path: epath.PathLike) -> str:
    """The text of a file in UTF-8, without a byte-order mark; line ends stay as they are."""
    # epath's read_text ignores the encoding: it keeps the mark, and reads gs:// by the locale.
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
