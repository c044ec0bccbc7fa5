"""The errors that a person can cause, and the exit code of each.

Every message is one line that says what is wrong, where, and what to do. Any other exception that
escapes a command is an internal error (exit code 1). Imports nothing, so that it costs nothing.
"""


def reason(error: Exception) -> str:
    """Why, in words for one line: an OSError's without its number and the name of the file."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class NanochatError(Exception):
    """Base of all expected errors; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(NanochatError):
    """Bad usage or configuration."""

    exit_code = 2


class DataError(NanochatError):
    """Bad input data or a bad file."""

    exit_code = 3


class ValidationFailure(NanochatError):
    """A check on something that we produced failed (export verification, validate)."""

    exit_code = 4


class Diverged(NanochatError):
    """Training was stopped: too many steps in a row had a loss or a gradient that is not finite or far too large."""


class Interrupted(NanochatError):
    """Stopped by SIGINT or SIGTERM after the state was saved."""

    exit_code = 130
