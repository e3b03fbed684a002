"""Principals: keys with their scopes and limits. This module knows nothing about secrets or transport."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from svc.errors import PermissionDeniedError


class Scope(StrEnum):
    """A permission that a key may have."""

    INFER = "infer"
    FEEDBACK = "feedback"
    METRICS = "metrics"
    FILES = "files"
    """Permits uploading files, reading and deleting the key's own files, and creating batches of requests."""
    JOBS = "jobs"
    """Permits training models on the key's files."""
    ADMIN = "admin"
    """Includes all other scopes and permits any change to the service."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a key. If a limit is None, only the server's limit applies.

    Attributes:
        concurrent: maximum number of concurrent requests.
        tokens_per_day: maximum total of prompt and answer tokens per day. A day starts at midnight UTC.
    """

    requests_per_minute: int | None = None
    tokens_in_per_minute: int | None = None
    tokens_out_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """A key's identity, scopes and limits, without its secret.

    Attributes:
        name: name for display.
        models: names of the models that the key may use (all versions), or None for all models.
        weight: share of capacity that this key gets, relative to other keys, when capacity is short.
    """

    key_id: str
    name: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    weight: int = 1

    def may(self, scope: Scope) -> bool:
        """Return whether the key has the given scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def may_ask(self, model: str, owners: Collection[str] = ()) -> bool:
        """Return whether the key may use the given model.

        Args:
            model: NAME, NAME@N or NAME@alias.
            owners: ids of the keys whose jobs train the model. If there are any, every other key needs either an
                entry for the model in `models` or, if `models` is None, the `admin` scope.
        """
        if self.key_id in owners:
            return True
        if self.models is None:
            return not owners or self.may(Scope.ADMIN)
        return model.partition("@")[0] in self.models

    def require(self, scope: Scope) -> None:
        """Check that the key has the given scope.

        Raises:
            PermissionDeniedError: the key lacks the scope.
        """
        if not self.may(scope):
            raise PermissionDeniedError(
                f"key {self.key_id} lacks scope {scope}",
                expected=f"a key with scope {scope}; this key has {', '.join(sorted(self.scopes))}",
            )
