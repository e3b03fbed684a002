"""The exception hierarchy. Every error says what was wrong, what was expected and what to do next.

Errors are raised where a fault is detected and caught only at a boundary: the command line prints the text and exits
with `exit_code`; the gateway maps the class to an HTTP status (serving/http/errors.py).
"""

from typing import ClassVar


class SvcError(Exception):
    """Base class of all errors that a user can cause or fix.

    Args:
        wrong: the thing and what is wrong with it, including the value.
        expected: noun phrase that completes "expected: ..."; empty if `wrong` already says it.
        todo: the next step for the user; a command if possible.
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
    """An unknown setting, or a setting with an invalid value."""

    exit_code = 2


class DataError(SvcError):
    """Examples that cannot be read or trained on."""

    exit_code = 3


class RecipeError(SvcError):
    """A recipe with an unknown key, a value of the wrong type, or values that contradict each other."""

    exit_code = 4


class BaseModelError(SvcError):
    """A base model that is missing, incomplete or unsupported."""

    exit_code = 5


class DiskSpaceError(SvcError):
    """Not enough disk space for the next step; raised before the step starts."""

    exit_code = 6


class BusyError(SvcError):
    """Another process is using a run, a home or a port that this one needs."""

    exit_code = 7


class NotFoundError(SvcError):
    """A model, version, alias, format or other named thing that does not exist."""

    exit_code = 8


class IntegrityError(SvcError):
    """Stored data that is damaged or altered, for example a version whose files differ from its manifest."""

    exit_code = 9


class RegistryError(SvcError):
    """The registry or the store cannot be read or written."""

    exit_code = 15


class EngineError(SvcError):
    """The engine did not start, died, or returned an error or an invalid answer."""

    exit_code = 10


class ProbeError(EngineError):
    """The engine's log-probabilities differ from the version's probes: the loaded weights are not the version's."""


class SwapError(SvcError):
    """A swap that failed; the previous version is served again."""

    exit_code = 11


class RolledBackError(SvcError):
    """Raised when a rollout ended with the previous version: the candidate proved worse, or a user stopped it."""

    exit_code = 21


class UndecidedError(SvcError):
    """Raised when a rollout reached its deadline without proof for or against the candidate."""

    exit_code = 22


class TrainingError(SvcError):
    """A training stage that failed, or whose result is unusable."""

    exit_code = 12


class ServerNotRunningError(SvcError):
    """No server is running, or the server does not answer correctly."""

    exit_code = 13


class RefusedError(SvcError):
    """A requested change, such as a promotion, that was rejected."""

    exit_code = 14


class InterruptedRunError(SvcError):
    """A training run that was stopped before it finished; the same command resumes it."""

    exit_code = 16


class InsufficientMemoryError(SvcError):
    """A training run that does not fit in the available memory; raised before it starts."""

    exit_code = 20


class AuthenticationError(SvcError):
    """A key that is missing, invalid, expired or revoked. Its text contains at most the key's id, never a secret."""

    exit_code = 17


class PermissionDeniedError(SvcError):
    """A valid key that lacks the required scope."""

    exit_code = 18


class JudgeError(SvcError):
    """A judge that cannot be reached, rejected the request, or returned too few verdicts."""

    exit_code = 19
