"""Every error that mio-export raises on purpose, and the exit status that each one stands for.

A message is one or two lines: what is wrong, the value got, what is allowed, what to do.
"""


class MioError(Exception):
    """Base of all errors raised on purpose; a general failure."""

    exit_code = 1


class UsageError(MioError, ValueError):
    """An argument or a setting is not allowed."""

    exit_code = 2


class GateError(MioError):
    """Something was refused by a gate: parity, integrity, or too many failures."""

    exit_code = 3


class SpaceError(MioError):
    """Vectors of two embedding spaces, artifacts, precisions, decode modes or runtimes would be mixed."""

    exit_code = 4


class MissingBackendError(MioError):
    """A backend or an extra is not installed; the message names the command that installs it."""

    exit_code = 5


class OutOfMemoryError(MioError):
    """The machine has not enough memory; what was done is kept, and the same command resumes."""


class Interrupted(BaseException):
    """The user or the system stopped the program; what was committed is kept.

    Not an ``Exception``, so that nothing that handles failures takes it for one.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """Return an error's message for a place in a line: whitespace as single spaces, ``limit`` characters at most."""
    return " ".join(str(error).split())[:limit]


__all__ = [
    "GateError",
    "Interrupted",
    "MioError",
    "MissingBackendError",
    "OutOfMemoryError",
    "SpaceError",
    "UsageError",
    "one_line",
]
