"""Errors a person caused or can mend: one sentence, and the exit code that goes with it."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # stopped early with everything saved: run the same command again
EXIT_BAD_NUMBERS = 76
EXIT_LOST_PEER = 77
EXIT_DOES_NOT_FIT = 78  # `uoe plan`: no mesh of these devices has the memory


class UserError(Exception):
    """One sentence with the key or path, the value and the remedy; the command line prints it without a traceback."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(UserError):
    """A configuration key has a value that cannot be used."""

    def __init__(self, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{key}={value!r}: {remedy}")
        self.key = key
        self.value = value


class RunError(UserError):
    """The run cannot go on for a reason outside the code: a full disk, a directory that went away."""

    exit_code = EXIT_FAILED


class BadNumbers(UserError):
    """The loss, the gradient or the state is not finite, or jumped too often."""

    exit_code = EXIT_BAD_NUMBERS
