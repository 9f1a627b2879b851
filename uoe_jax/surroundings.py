"""What a process finds around it: standard streams, a home directory, and the environment variables of XLA and JAX.

Imports no jax. `settle` comes first of all; `check_variables` before the first use of a device.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from uoe_jax.errors import RunError, UserError

NO_HOME = "/dev/null"  # a HOME below which nobody, not even root, can make anything
_STREAMS = ("stdin", "stdout", "stderr")
_ESCAPED = "uoe_escaped"  # the error handler of our streams
_OF_DEVICES = re.compile(r"JAX_PLATFORM|JAX_NUM_CPU_DEVICES$|\w+_VISIBLE_DEVICES$|PJRT_|XLA_PYTHON_|TPU_LIBRARY_PATH$")
# Flags that every XLA we run on knows, with values that it takes; others are tried in a process of their own.
_KNOWN_FLAG = re.compile(
    r"--xla_force_host_platform_device_count=[1-9][0-9]{0,4}|--xla_backend_optimization_level=[0-3]|"
    r"--xla_(gpu_deterministic_ops|llvm_disable_expensive_passes|cpu_enable_fast_math)=(true|false)"
)
_JAX_HINT = r" \(set JAX_PLATFORMS='' .*"
_KNOWN_TO_0_10 = re.compile(r"--xla_cpu_use_fusion_emitters=(true|false)")


def settle() -> None:
    """Makes standard streams and HOME such that nothing later fails for lack of them; the first thing a process does."""
    _open_descriptors()
    codecs.register_error(_ESCAPED, _Escape())
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    for name in _STREAMS[1:]:
        setattr(sys, name, Output(getattr(sys, name) or open(os.devnull, "w")))
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        if os.path.expanduser("~") == "~":  # no passwd entry either, and libraries raise for it when they are imported
            os.environ["HOME"] = NO_HOME


# --- streams ----------------------------------------------------------------------------------------------------


def _open_descriptors() -> None:
    """Opens /dev/null where descriptor 0, 1 or 2 is closed: else the next file opened gets its number, and what C++ code
    writes to stderr would go into a checkpoint or the lock."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


class OutputLost(RunError):
    """Nobody takes what is written to stdout."""


class Output(io.TextIOWrapper):
    """stdout or stderr, which takes every text. What its encoding lacks is escaped, and that is told once.

    What cannot be written (a full device, a reader that went away) is lost on stderr, and raises OutputLost on stdout.
    """

    def __init__(self, old: Any, buffer: Any = None) -> None:
        """old: the stream whose place it takes. buffer: to write to, instead of old's."""
        super().__init__(
            old.buffer if buffer is None else buffer, old.encoding, errors=_ESCAPED,
            line_buffering=old.line_buffering or buffer is not None, write_through=old.write_through,
        )  # fmt: skip
        self._old, self._is_result = old, old is sys.stdout

    def write(self, text: str) -> int:
        with self._losing():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            super().flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_result:
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still in the buffer at the end
                reason = error.strerror or error
                raise OutputLost(f"standard output: cannot be written ({reason}); what was to be shown is lost") from error


class _Escape:
    """Error handler of `Output`: bytes of arguments that were no text go out as they came in, other characters as \\u2026."""

    told = False

    def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        character, after = error.object[error.start], error.start + 1
        if "\udc80" <= character <= "\udcff":
            return bytes([ord(character) - 0xDC00]), after
        if not self.told:
            self.told = True
            text = f"uoe: the output takes {error.encoding} alone: other characters are written as \\u2026 is; set PYTHONIOENCODING=utf-8\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        return character.encode("ascii", "backslashreplace").decode(), after


def tell(text: str) -> None:
    """Prints a line about work that is done and saved; where nobody takes it, that is said on stderr, and is no error."""
    try:
        print(text, flush=True)
    except OutputLost as error:
        print(f"uoe: {error}", file=sys.stderr, flush=True)


def takes_utf8(stream: TextIO) -> bool:
    """Whether every character can be written to a stream as UTF-8."""
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"


# --- directories ------------------------------------------------------------------------------------------------


def expanded(path: str | os.PathLike[str], option: str) -> str:
    """The path with ~ and ~user replaced. option: where it was given, for errors.

    Raises:
      UserError: no home directory is known.
    """
    name = os.fspath(path)
    found = os.path.expanduser(name)
    unknown = found == name or found == NO_HOME or found.startswith(f"{NO_HOME}/")
    if name.startswith("~") and unknown and not os.path.lexists(name):
        user = name.partition("/")[0]
        raise UserError(f"{option}={name}: {user} is no home directory that is known here; give the whole path, or ./{name}")
    return found


def check_encoding(path: str, option: str) -> None:
    """Raises UserError for a path that Python cannot decode, which libraries in C++ do not take."""
    if re.search("[\ud800-\udfff]", path):
        encoding = sys.getfilesystemencoding()
        remedy = "give another" if encoding == "utf-8" else "give another, or unset PYTHONUTF8 and set LC_ALL=C.UTF-8"
        raise UserError(f"{option}={path!r}: is not {encoding}, the encoding of paths here; {remedy}")


def default_cache_dir() -> Path:
    """$UOE_CACHE, else ~/.cache/uoe_jax; made readable by its owner alone. Where there is no home directory that can be
    written, one in the system's temporary directory, which is said once. Raises UserError if none can be written."""
    given = os.environ.get("UOE_CACHE")
    remedy = "set UOE_CACHE to a directory that can be written."
    try:
        directory = Path(expanded(given or "~/.cache/uoe_jax", "UOE_CACHE")).absolute()
        check_encoding(str(directory), "UOE_CACHE")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
        why = f"UOE_CACHE={directory}: the data cache cannot be written: {remedy}"
    except OSError as error:
        why = f"UOE_CACHE={given}: cannot make the data cache ({error.strerror}): {remedy}"
    except UserError as error:
        why = str(error)
    if given:
        raise UserError(why)
    return _temporary_cache()


def _temporary_cache() -> Path:
    """A directory of this user alone, who need not have a name; the same at the next call, and in processes started from here.

    It holds native code, so one in which others could have written is passed over for a new one.
    """
    try:
        directory = Path(tempfile.gettempdir(), f"uoe_jax-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            directory = Path(tempfile.mkdtemp(prefix=f"{directory.name}-"))
        directory.chmod(0o700)
    except OSError as error:
        raise UserError(f"UOE_CACHE: is not set, and there is no directory for it ({error}); set it to one that can be written") from error
    os.environ["UOE_CACHE"] = str(directory)
    print(f"uoe: no home directory can be written, so prepared data and compiled programs are kept in {directory}; "
          "set UOE_CACHE to keep them elsewhere", file=sys.stderr, flush=True)  # fmt: skip
    return directory


# --- variables of XLA and JAX -----------------------------------------------------------------------------------


def check_variables(jaxlib_version: str) -> None:
    """Refuses XLA_FLAGS that XLA would abort the process for, and drops variables of tqdm that its import fails on.

    Raises:
      UserError: with the flags, and what XLA says of them.
    """
    _check_flags(jaxlib_version)
    theirs = {name: value for name, value in os.environ.items() if name.startswith("TQDM_")}
    if theirs and "tqdm" not in sys.modules:
        try:
            import tqdm  # noqa: F401
        except Exception as error:
            for name in theirs:
                del os.environ[name]
            print(f"uoe: {_written(theirs)}: left out, as tqdm does not take it ({_reason(error)})", file=sys.stderr, flush=True)


def _check_flags(jaxlib_version: str) -> None:
    text = os.environ.get("XLA_FLAGS", "")
    if text and not text.lstrip().startswith("-"):
        text = _flags_of_file(text)
    if not text.strip():
        os.environ.pop("XLA_FLAGS", None)  # XLA takes blanks for the name of a file
        return
    os.environ["XLA_FLAGS"] = text
    known = [_KNOWN_FLAG, *([_KNOWN_TO_0_10] if jaxlib_version.startswith("0.10.") else [])]
    if all(any(pattern.fullmatch(flag) for pattern in known) for flag in text.split()):
        return
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "PJRT_"))}
    env |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}  # it must not take an accelerator, and must say what is wrong
    command = [sys.executable, "-P", "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        said = [re.sub(r"^[A-Z]\d{4} .*?\] ", "", line) for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        first = [line for line in said if re.match("Unknown flag|Couldn't interpret", line)]
        reason = re.sub(_JAX_HINT, "", (first or said[-1:] or [f"exit code {done.returncode}"])[0].strip())[:300]
        raise UserError(f"XLA_FLAGS={' '.join(text.split())}: XLA does not take this ({reason}); correct it, or unset it")


def _flags_of_file(name: str) -> str:
    """The flags in the file that XLA_FLAGS names; they take its place there, so that more can be added."""
    if not name.strip():
        return ""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"XLA_FLAGS={name}: does not begin with --, and is no file of flags that can be read ({_reason(error)}); "
            "give --xla_… flags, or a file of them"
        ) from error
    if text.strip() and not text.lstrip().startswith("-"):
        raise UserError(f"XLA_FLAGS={name}: is a file that does not begin with a flag; write --xla_… flags in it")
    return text


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what jax raises when it is imported, for a variable with a value that it does not take, to UserError."""
    try:
        yield
    except Exception as error:
        frames = [f for f, _ in traceback.walk_tb(error.__traceback__) if f.f_code.co_name == "<module>"]
        if isinstance(error, UserError) or not any(re.match(r"jax(lib)?\.|jax$", f.f_globals.get("__name__", "")) for f in frames):
            raise
        found, text = {k: v for k, v in sorted(os.environ.items()) if k.startswith("JAX_")}, str(error)
        named = {k: v for k, v in found.items() if k in text.upper()} or {k: v for k, v in found.items() if v in text}
        if not found:
            raise
        remedy = "give another value, or unset it"
        raise UserError(f"{_written(named or found)}: jax cannot be imported with this ({_reason(error)}); {remedy}") from error


def no_device(error: Exception) -> UserError:
    """What is said where jax finds no device."""
    said = re.sub(_JAX_HINT, "", _reason(error))
    if "gloo" in said and (unknown := unknown_host(socket.gethostname())):
        return UserError(
            f"the name of this machine, {socket.gethostname()}, has no address ({unknown}), and Gloo, which joins processes "
            "on CPUs, asks for it; add it to /etc/hosts"
        )
    found = {name: value for name, value in sorted(os.environ.items()) if _OF_DEVICES.match(name)}
    remedy = "give another value, or unset it" if found else "install jax for your accelerator, or set JAX_PLATFORMS=cpu"
    return UserError(f"{_written(found) or 'JAX_PLATFORMS'}: jax finds no device to run on ({said}); {remedy}")


def unknown_host(host: str) -> str:
    """Why a name of a machine has no address here; empty where it has one."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError as error:
        return str(error)
    return ""


def _written(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())


def _reason(error: Exception) -> str:
    """An error in a line."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
