"""The exception hierarchy. Every error says what is wrong, what was expected and what to do next.

Errors are raised where a problem is detected, and caught only at the boundaries of the program. The
command line prints the error's text and exits with `exit_code`; the gateway maps the class to an HTTP
status (serving/http/errors.py).
"""

from typing import ClassVar


class SvcError(Exception):
    """Base class for all errors that a user can cause or fix.

    Args:
        wrong: what is wrong, including the name of the affected object and the offending value.
        expected: noun phrase to complete "expected: ..."; empty if `wrong` already makes it clear.
        todo: what the user should do next, as a command if possible.
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
    """Raised for an unknown setting, or a setting with an invalid value."""

    exit_code = 2


class DataError(SvcError):
    """Raised for examples that cannot be read or used for training."""

    exit_code = 3


class RecipeError(SvcError):
    """Raised for a recipe with an unknown key, a value of the wrong type, or contradictory values."""

    exit_code = 4


class BaseModelError(SvcError):
    """Raised for a base model that is missing, incomplete or unsupported."""

    exit_code = 5


class DiskSpaceError(SvcError):
    """Raised before an operation begins if there is not enough disk space for it."""

    exit_code = 6


class BusyError(SvcError):
    """Raised when another process is using a training run, home folder or port that this process needs."""

    exit_code = 7


class NotFoundError(SvcError):
    """Raised when a model, version, alias, format or other named object does not exist."""

    exit_code = 8


class IntegrityError(SvcError):
    """Raised when stored data is damaged or altered, such as a version whose files differ from its manifest."""

    exit_code = 9


class RegistryError(SvcError):
    """Raised when the registry or the store cannot be read or written."""

    exit_code = 15


class EngineError(SvcError):
    """Raised when an engine does not start, dies, or returns an error or an invalid response."""

    exit_code = 10


class ProbeError(EngineError):
    """Raised when log-probabilities differ from a version's probes, which means that the wrong weights are loaded."""


class SwapError(SvcError):
    """Raised when a swap has failed. The previous version is being served again."""

    exit_code = 11


class RolledBackError(SvcError):
    """Raised when a rollout ends with the previous version in production.

    Either the candidate proved worse, or a user stopped the rollout.
    """

    exit_code = 21


class UndecidedError(SvcError):
    """Raised when a rollout reaches its deadline without enough evidence for or against the candidate."""

    exit_code = 22


class TrainingError(SvcError):
    """Raised when a training stage fails or its result is unusable."""

    exit_code = 12


class ServerNotRunningError(SvcError):
    """Raised when no server is running, or when the server is not responding correctly."""

    exit_code = 13


class RefusedError(SvcError):
    """Raised when a requested change, such as a promotion, is refused."""

    exit_code = 14


class InterruptedRunError(SvcError):
    """Raised when a training run is stopped before it has finished. Running the same command again resumes it."""

    exit_code = 16


class InsufficientMemoryError(SvcError):
    """Raised before training starts if the run would not fit in the available memory."""

    exit_code = 20


class GateError(RefusedError):
    """Raised when a gate refuses a promotion.

    The version failed at least one gate, or a gate was undecided and the settings refuse undecided gates.
    """

    exit_code = 23


class AuthenticationError(SvcError):
    """Raised when a key is missing, invalid, expired or revoked.

    The message may contain the id of the key, but never its secret.
    """

    exit_code = 17


class PermissionDeniedError(SvcError):
    """Raised when a valid key lacks the required scope."""

    exit_code = 18


class JudgeError(SvcError):
    """Raised when a judge cannot be reached, rejects the request, or returns too few verdicts."""

    exit_code = 19
