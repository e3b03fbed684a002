"""Who asks: a key with its scopes and limits. Knows nothing of secrets or of how requests come in."""

from dataclasses import dataclass, field
from enum import StrEnum

from svc.errors import PermissionDeniedError


class Scope(StrEnum):
    """What a key may be used for."""

    INFER = "infer"
    FEEDBACK = "feedback"
    METRICS = "metrics"
    TRAIN = "train"
    ADMIN = "admin"
    """All of the others, and whatever changes the service."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a key may use; None: as much as the server has.

    Attributes:
        concurrent: requests at once.
        tokens_per_day: in and out together, from midnight UTC.
    """

    requests_per_minute: int | None = None
    tokens_in_per_minute: int | None = None
    tokens_out_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """A key, as whoever answers its requests knows it.

    Attributes:
        name: what people call the key.
        models: names of models that it may ask, whichever version; None: all.
        weight: its share beside other keys where there is not enough for all.
    """

    key_id: str
    name: str
    scopes: frozenset[Scope]
    models: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    weight: int = 1

    def may(self, scope: Scope) -> bool:
        """Whether it may do something."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def may_ask(self, model: str) -> bool:
        """Whether it may ask a model.

        Args:
            model: NAME, NAME@N or NAME@alias.
        """
        return self.models is None or model.partition("@")[0] in self.models

    def require(self, scope: Scope) -> None:
        """Raises where it may not do something.

        Raises:
            PermissionDeniedError: names the scope.
        """
        if not self.may(scope):
            raise PermissionDeniedError(
                f"the key {self.key_id} has not the scope {scope}",
                expected=f"a key with {scope}; this one has {', '.join(sorted(self.scopes))}",
            )
