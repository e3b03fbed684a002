"""The exception hierarchy. Every error says what was wrong, what was expected and what to do next.

Errors are raised where a fault is detected, and caught only at a boundary. The command line prints the
error's text and exits with `exit_code`; the gateway maps the class to an HTTP status
(serving/http/errors.py).
"""

from typing import ClassVar


class SvcError(Exception):
    """Base class of all errors that a user can cause or fix.

    Args:
        wrong: what is wrong, naming the affected thing and the value.
        expected: noun phrase that completes "expected: ..."; empty if `wrong` already says it.
        todo: the next step for the user, as a command if possible.
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
    """Raised for examples that cannot be read or trained on."""

    exit_code = 3


class RecipeError(SvcError):
    """Raised for a recipe with an unknown key, a value of the wrong type, or contradictory values."""

    exit_code = 4


class BaseModelError(SvcError):
    """Raised for a base model that is missing, incomplete or unsupported."""

    exit_code = 5


class DiskSpaceError(SvcError):
    """Raised if there is not enough disk space for the next step, before that step starts."""

    exit_code = 6


class BusyError(SvcError):
    """Raised if another process is using a run, home or port that this process needs."""

    exit_code = 7


class NotFoundError(SvcError):
    """Raised for a model, version, alias, format or other named thing that does not exist."""

    exit_code = 8


class IntegrityError(SvcError):
    """Raised for damaged or altered stored data, such as a version whose files differ from its manifest."""

    exit_code = 9


class RegistryError(SvcError):
    """Raised if the registry or the store cannot be read or written."""

    exit_code = 15


class EngineError(SvcError):
    """Raised if the engine did not start, died, or returned an error or an invalid response."""

    exit_code = 10


class ProbeError(EngineError):
    """Raised if log-probabilities differ from the version's probes: the loaded weights are not the version's."""


class SwapError(SvcError):
    """Raised for a failed swap. The previous version is served again."""

    exit_code = 11


class RolledBackError(SvcError):
    """Raised when a rollout ended with the previous version: the candidate proved worse, or a user stopped it."""

    exit_code = 21


class UndecidedError(SvcError):
    """Raised when a rollout reached its deadline without proof for or against the candidate."""

    exit_code = 22


class TrainingError(SvcError):
    """Raised for a training stage that failed or whose result is unusable."""

    exit_code = 12


class ServerNotRunningError(SvcError):
    """Raised if no server is running, or if the server does not respond correctly."""

    exit_code = 13


class RefusedError(SvcError):
    """Raised if a requested change, such as a promotion, was refused."""

    exit_code = 14


class InterruptedRunError(SvcError):
    """Raised for a training run that was stopped before it finished. The same command resumes it."""

    exit_code = 16


class InsufficientMemoryError(SvcError):
    """Raised before a training run starts if it does not fit in the available memory."""

    exit_code = 20


class GateError(RefusedError):
    """Raised if a promotion was refused by a gate: the version failed a check, or was measured to be worse."""

    exit_code = 23


class AuthenticationError(SvcError):
    """Raised for a missing, invalid, expired or revoked key. The text may contain its id, but never a secret."""

    exit_code = 17


class PermissionDeniedError(SvcError):
    """Raised for a valid key that lacks the required scope."""

    exit_code = 18


class JudgeError(SvcError):
    """Raised if a judge cannot be reached, rejected the request, or returned too few verdicts."""

    exit_code = 19
