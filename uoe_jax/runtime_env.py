"""The environment of a process: standard streams, home directory, variables of XLA and JAX.

Imports no jax. `prepare_process` comes first, `check_variables` before the first use of a device.
"""

import codecs
import contextlib
import functools
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

from uoe_jax.errors import RunError, UserError, os_error_as, reason

NO_HOME = "/dev/null"  # a HOME below which nobody, not even root, can create anything
_ESCAPED = "uoe_escaped"  # the error handler of our streams
_DEVICE_VARIABLES = re.compile(
    r"JAX_PLATFORM|JAX_NUM_CPU_DEVICES$|\w+_VISIBLE_DEVICES$|PJRT_|XLA_PYTHON_|TPU_LIBRARY_PATH$"
)
# Flags that every supported XLA accepts, and one more of 0.10; others are tried in a process.
_KNOWN_FLAG = (
    r"--xla_force_host_platform_device_count=[1-9][0-9]{0,4}|"
    r"--xla_backend_optimization_level=[0-3]|"
    r"--xla_(gpu_deterministic_ops|llvm_disable_expensive_passes|cpu_enable_fast_math)=(true|false)"
)
_KNOWN_TO_0_10 = r"|--xla_cpu_use_fusion_emitters=(true|false)"
_JAX_HINT = r" \(set JAX_PLATFORMS='' .*"


def prepare_process() -> None:
    """Sets up standard streams and HOME so that nothing fails for lack of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: a file opened later would get what C++ code writes to stderr
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
    codecs.register_error(_ESCAPED, _escape)
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    for name in ("stdout", "stderr"):
        setattr(sys, name, Output(getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")))
    if not os.environ.get("HOME"):
        os.environ.pop("HOME", None)
        if os.path.expanduser("~") == "~":  # no passwd entry either: importing bokeh would raise
            os.environ["HOME"] = NO_HOME


# --- streams --------------------------------------------------------------------------------------


class OutputLost(RunError):
    """What was written to stdout could not be delivered."""


class Output(io.TextIOWrapper):
    """stdout or stderr that accepts any text: characters its encoding lacks are escaped.

    A failed write (full device, closed pipe) is ignored on stderr, and raises OutputLost on stdout.
    It replaces `old`, and writes to its buffer or another.
    """

    def __init__(self, old: Any, buffer: Any = None) -> None:
        target, by_line = buffer or old.buffer, bool(buffer) or old.line_buffering
        super().__init__(target, old.encoding, _ESCAPED, None, by_line, old.write_through)
        self._old, self._is_stdout = old, old is sys.stdout

    def write(self, text: str) -> int:
        with self._checked():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._checked():
            super().flush()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._is_stdout:
                with contextlib.suppress(OSError):  # for what is still in the buffer at exit
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
                problem = f"cannot be written ({_one_line(error)}); what was to be shown is lost"
                raise OutputLost(f"standard output: {problem}") from error


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler of `Output`: undecodable bytes as they came in, others escaped, with notice."""
    if isinstance(error, UnicodeEncodeError):
        error.end = error.start + 1  # one character at a time
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError as lacking:
        _notice_escapes(lacking.encoding)
        return codecs.backslashreplace_errors(error)


@functools.cache
def _notice_escapes(encoding: str) -> None:
    what = f"the output takes {encoding} alone: other characters are written as \\u2026 is"
    with contextlib.suppress(OSError):
        os.write(2, f"uoe: {what}; set PYTHONIOENCODING=utf-8\n".encode())


def notice(text: str) -> None:
    """Prints `uoe: text` on stderr, where that is possible."""
    with contextlib.suppress(OSError, ValueError):  # full, or closed
        print(f"uoe: {text}", file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """Prints a line about work that is done and saved; losing it is no error."""
    try:
        print(text, flush=True)
    except OutputLost as error:
        notice(str(error))


def takes_utf8(stream: TextIO) -> bool:
    """Whether every character can be written to a stream as UTF-8."""
    return codecs.lookup(stream.encoding or "ascii").name == "utf-8"


# --- directories ----------------------------------------------------------------------------------


def expanded(path: str | os.PathLike[str], option: str) -> str:
    """The path with ~ and ~user replaced; UserError, with the option, for an unknown home."""
    name = os.fspath(path)
    found = os.path.expanduser(name)
    unknown = found in (name, NO_HOME) or found.startswith(f"{NO_HOME}/")
    if name.startswith("~") and unknown and not os.path.lexists(name):
        problem = f"{name.partition('/')[0]} is no home directory that is known here"
        raise UserError(f"{option}={name}: {problem}; give the whole path, or ./{name}")
    return found


def default_cache_dir() -> Path:
    """$UOE_CACHE, ~/.cache/uoe_jax or `_temporary_cache`; UserError where none can be written."""
    given = os.environ.get("UOE_CACHE")
    remedy = "set UOE_CACHE to a directory that can be written"
    try:
        directory = Path(expanded(given or "~/.cache/uoe_jax", "UOE_CACHE")).absolute()
        if re.search("[\ud800-\udfff]", str(directory)):  # C++ libraries do not accept it
            encoding = sys.getfilesystemencoding()
            more = "" if encoding == "utf-8" else ", or unset PYTHONUTF8 and set LC_ALL=C.UTF-8"
            problem = f"is not {encoding}, the encoding of paths here; give another{more}"
            raise UserError(f"UOE_CACHE={str(directory)!r}: {problem}")
        with os_error_as(UserError, f"UOE_CACHE={given}: cannot make the data cache", remedy):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UserError(f"UOE_CACHE={directory}: the data cache cannot be written; {remedy}")
        return directory
    except UserError:
        if given:
            raise
    return _temporary_cache()


def _temporary_cache() -> Path:
    """This user's directory in the temporary one, or a new one where others could have written."""
    problem = f"is not set, and no directory can be made for it in {tempfile.gettempdir()}"
    remedy = "set it to one that can be written"
    with os_error_as(UserError, f"UOE_CACHE: {problem}", remedy):
        directory = Path(tempfile.gettempdir(), f"uoe_jax-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = os.lstat(directory)
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if not ours or found.st_mode & 0o022:
            directory = Path(tempfile.mkdtemp(prefix=f"{directory.name}-"))
        directory.chmod(0o700)
    os.environ["UOE_CACHE"] = str(directory)
    kept = f"prepared data and compiled programs are kept in {directory}"
    notice(f"no home directory can be written, so {kept}; set UOE_CACHE to keep them elsewhere")
    return directory


# --- variables of XLA and JAX ---------------------------------------------------------------------


def check_variables(jaxlib_version: str) -> None:
    """UserError for XLA_FLAGS that XLA would abort for; drops variables that tqdm cannot read."""
    _check_flags(jaxlib_version)
    of_tqdm = {name: value for name, value in os.environ.items() if name.startswith("TQDM_")}
    if of_tqdm and "tqdm" not in sys.modules:
        try:
            import tqdm  # noqa: F401
        except Exception as error:
            for name in of_tqdm:
                del os.environ[name]
            notice(f"{_listing(of_tqdm)}: left out, as tqdm rejects it ({_one_line(error)})")


def _check_flags(jaxlib_version: str) -> None:
    text = _flags()
    if not text.strip():
        os.environ.pop("XLA_FLAGS", None)  # XLA takes blanks for the name of a file
        return
    os.environ["XLA_FLAGS"] = text
    known = _KNOWN_FLAG + (_KNOWN_TO_0_10 if jaxlib_version.startswith("0.10.") else "")
    if all(re.fullmatch(known, flag) for flag in text.split()):
        return
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PJRT_"))}
    env |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}  # no accelerator, but messages
    command = [sys.executable, "-P", "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        log = done.stderr.decode(errors="replace").strip()
        lines = [re.sub(r"^[A-Z]\d{4} .*?\] ", "", line) for line in log.splitlines()]
        first = [line for line in lines if re.match("Unknown flag|Couldn't interpret", line)]
        found = (first or lines[-1:] or [f"exit code {done.returncode}"])[0]
        why = re.sub(_JAX_HINT, "", found.strip())[:300]
        given = f"XLA_FLAGS={' '.join(text.split())}"
        raise UserError(f"{given}: XLA does not take this ({why}); correct it, or unset it")


def _flags() -> str:
    """XLA_FLAGS, or what is in the file that it names: so flags can be added."""
    name = os.environ.get("XLA_FLAGS", "")
    if not name.strip() or name.lstrip().startswith("-"):
        return name
    try:
        text = Path(name).read_text(encoding="utf-8")
        if text.strip() and not text.lstrip().startswith("-"):
            raise ValueError("it does not begin with a flag")
        return text
    except (OSError, ValueError) as error:
        problem = f"does not begin with --, and is no file of flags ({_one_line(error)})"
        remedy = "give --xla_… flags, or a file of them"
        raise UserError(f"XLA_FLAGS={name}: {problem}; {remedy}") from error


@contextlib.contextmanager
def jax_import_errors() -> Iterator[None]:
    """Turns what `import jax` raises for a bad environment variable into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = {k: v for k, v in sorted(os.environ.items()) if k.startswith("JAX_")}
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        importing = [f.f_globals.get("__name__") for f in frames if f.f_code.co_name == "<module>"]
        if not found or not any(re.match(r"jax(lib)?(\.|$)", str(name)) for name in importing):
            raise
        text = str(error)
        named = {k: v for k, v in found.items() if k in text.upper()}
        named = named or {k: v for k, v in found.items() if v in text} or found
        problem = f"jax cannot be imported with this ({_one_line(error)})"
        raise UserError(f"{_listing(named)}: {problem}; give another value, or unset it") from error


def no_device(error: Exception) -> UserError:
    """The error for the user where jax finds no device."""
    why, host = re.sub(_JAX_HINT, "", _one_line(error)), socket.gethostname()
    if "gloo" in why and (unknown := unknown_host(host)):
        problem = f"the name of this machine, {host}, has no address ({unknown})"
        asks = "Gloo, which joins processes on CPUs, asks for it"
        return UserError(f"{problem}, and {asks}; add it to /etc/hosts")
    found = {k: v for k, v in sorted(os.environ.items()) if _DEVICE_VARIABLES.match(k)}
    remedy = "give another value, or unset it" if found else "set it to cpu to do without"
    what = _listing(found) or "JAX_PLATFORMS"
    return UserError(f"{what}: jax finds no device to run on ({why}); {remedy}")


def unknown_host(host: str) -> str:
    """Why a host name cannot be resolved here; "" where it can."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        return reason(error)
    return ""


def _listing(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())


def _one_line(error: Exception) -> str:
    lines = reason(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
