"""Errors that a user can fix: one sentence, and the exit code that goes with it."""

import contextlib
from collections.abc import Iterator

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # stopped early with everything saved: run the same command again
EXIT_BAD_NUMBERS = 76
EXIT_LOST_PEER = 77
EXIT_DOES_NOT_FIT = 78  # `uoe plan`: no mesh of these devices has the memory


class UserError(Exception):
    """One sentence with the key or path, the value and the remedy; shown without a traceback."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(UserError):
    """A configuration key has a value that cannot be used."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key}={value!r}: {remedy}")
        self.key = key
        self.value = value


class RunError(UserError):
    """The run cannot go on for a reason outside the code: a full disk, a deleted directory."""

    exit_code = EXIT_FAILED


class BadNumbers(UserError):
    """The loss, the gradient or the state is not finite, or jumped too often."""

    exit_code = EXIT_BAD_NUMBERS


AGAIN = "fix that and run the same command again"  # the remedy where a cause outside was removed


def reason(error: BaseException) -> str:
    """What an error says: of an OSError the system's text, without path and number."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def os_error_as(kind: type[UserError], problem: str, remedy: str) -> Iterator[None]:
    """Raises an OSError of the block as `kind("problem (reason); remedy")`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{problem} ({reason(error)}); {remedy}") from error
