"""The error tree. Every error says what was wrong, what was expected and what to do next.

Raised where the fault is found, caught at a boundary only: the command line prints the text and exits with
`exit_code`; the gateway maps the class to an HTTP status (serving/http/errors.py).
"""

from typing import ClassVar


class SvcError(Exception):
    """Root of all errors that a user can cause or mend.

    Args:
        wrong: what was wrong, with the value.
        expected: what would have been right; may be empty where `wrong` already says it.
        todo: the next thing to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, wrong: str, *, expected: str = "", todo: str = "") -> None:
        super().__init__(wrong)
        self.wrong = wrong
        self.expected = expected
        self.todo = todo

    def __str__(self) -> str:
        lines = [self.wrong]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.todo:
            lines.append(f"  do: {self.todo}")
        return "\n".join(lines)


class SettingsError(SvcError):
    """A setting that does not exist or has a wrong value."""

    exit_code = 2


class DataError(SvcError):
    """Examples that cannot be read or trained on."""

    exit_code = 3


class RecipeError(SvcError):
    """A recipe with an unknown key, a wrong type or an impossible combination."""

    exit_code = 4


class BaseModelError(SvcError):
    """A base model that cannot be found or is not complete."""

    exit_code = 5


class DiskSpaceError(SvcError):
    """Not enough room for what comes next; raised before it starts."""

    exit_code = 6


class BusyError(SvcError):
    """Another process holds what this one needs: a run, a home, a port."""

    exit_code = 7


class NotFoundError(SvcError):
    """A name, version, alias or format that the registry does not have."""

    exit_code = 8


class IntegrityError(SvcError):
    """A version whose files are not what its manifest says."""

    exit_code = 9


class RegistryError(SvcError):
    """The registry cannot be read or written."""

    exit_code = 15


class EngineError(SvcError):
    """The engine did not start, died, or answered what it must not."""

    exit_code = 10


class ProbeError(EngineError):
    """The engine gives other log-probabilities than the version's probes: these are not its weights."""


class SwapError(SvcError):
    """A swap that was not completed; what served before serves again."""

    exit_code = 11


class TrainingError(SvcError):
    """A training stage whose result cannot be used."""

    exit_code = 12


class ServerNotRunningError(SvcError):
    """A command that needs a running server found none."""

    exit_code = 13


class RefusedError(SvcError):
    """A promotion that was asked for and not carried out."""

    exit_code = 14


class InterruptedRunError(SvcError):
    """A training run that was asked to end before it was done; the same command goes on."""

    exit_code = 16


class InsufficientMemoryError(SvcError):
    """A training that cannot fit into the memory that there is; raised before it starts."""

    exit_code = 20


class AuthenticationError(SvcError):
    """A key that is missing, wrong, expired or revoked. Never says more of a secret than the id of its key."""

    exit_code = 17


class PermissionDeniedError(SvcError):
    """A key that is right, and may not do this."""

    exit_code = 18


class JudgeError(SvcError):
    """A judge that cannot be reached, refused, or answered what is no verdict."""

    exit_code = 19
