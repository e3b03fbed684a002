"""The names of a served model, and the version that each name currently refers to.

This module knows the loaded versions, but not how they were loaded. A name is resolved after admission,
so that a request that was queued during a swap gets the new version. Choosing a request's model is left to the
router.
"""

import time
from collections.abc import Callable

from serving.admission.errors import EngineUnavailableError
from serving.protocols.error_code import ErrorCode, answered_with
from svc.errors import NotFoundError
from svc.version import Alias, Format, Target, VersionId

SHOWN_CHARS = 100
"""Maximum length of text from a client that is quoted in an error message."""


@answered_with(404, ErrorCode.MODEL_NOT_FOUND)
class ModelNotFoundError(NotFoundError):
    """Raised when a model name does not match any loaded version."""


class ModelNames:
    """The names under which clients may request a model.

    They are `NAME`, `NAME@production`, and `NAME@N` for each loaded version, or for any version if adapters are served.

    Args:
        name: the served model name, without a version.
        clock: returns the Unix time, in seconds.

    Attributes:
        served: the version in production, or None until a version is served.
        loaded: the versions that engines have loaded. While a swap changes several engines one by one, there are two.
        since: time at which the production version was promoted, in Unix seconds.
        candidate: the version that a rollout is testing, or None if there is no rollout.
        of_candidate: the client-facing name of the candidate, `NAME@candidate`.
        assigned: internal name for requests that a rollout assigned to the candidate, which resolves to
            production while no engine runs the candidate. Clients cannot use it.
        candidate_on_demand: whether engines load the candidate as an adapter when it is requested.
        owners: ids of the keys whose jobs train the model; only these keys and admins may use it. Empty for a model
            that the operator trains.
        guests: versions of other models that the engines may load as adapters, because they have the same base.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self._in_production = frozenset({name, f"{name}@{Alias.PRODUCTION}"})
        self._clock = clock
        self.served: Target | None = None
        self.loaded: set[Target] = set()
        self.since = 0
        self.candidate: VersionId | None = None
        self.candidate_on_demand = False
        self.owners: frozenset[str] = frozenset()
        self.guests: set[VersionId] = set()
        self.of_candidate = f"{name}@{Alias.CANDIDATE}"
        self.assigned = f"{self.of_candidate}?"

    def serve(self, served: Target) -> None:
        if served != self.served:
            self.served, self.since = served, int(self._clock())

    @property
    def versions(self) -> set[VersionId]:
        """The version in production and all other loaded versions, including loaded versions of other models."""
        return {target.version for target in (self.served, *self.loaded) if target}

    def all(self) -> tuple[str, ...]:
        """Return all names that currently resolve to a version."""
        if self.served is None:
            return ()
        aliases = [f"{self.name}@{Alias.PRODUCTION}", *([self.of_candidate] if self.candidate else [])]
        own = sorted(version for version in self.versions if version.name == self.name)
        return self.name, *map(str, own), *aliases

    def resolve(self, model: str) -> VersionId | None:
        """Return the version that a client's model name refers to, or None for the production version.

        Requests for the production version can be answered by any ready engine. If adapters are served, the returned
        version might not be loaded or might not even exist, so the caller must check it.

        Raises:
            ModelNotFoundError: the name is not served here.
            EngineUnavailableError: no version is loaded yet.
        """
        if self.served is None:
            raise EngineUnavailableError("no version is loaded yet", todo="retry the request later")
        if model in self._in_production:
            return None
        if model in (self.assigned, self.of_candidate) and (candidate := self._available_candidate()):
            return candidate
        if model == self.assigned:
            return None
        for loaded in self.loaded:
            if model == str(loaded.version):
                return loaded.version
        if self.served.format is Format.ADAPTER and (version := self._parsed(model)):
            return version
        known = "" if self.owners else f"one of {', '.join(self.all())}"  # which only their owners may see
        raise ModelNotFoundError(f"model {model[:SHOWN_CHARS]!r} is not served here", expected=known)

    def _available_candidate(self) -> VersionId | None:
        """Return the rollout's candidate, or None if there is none or no engine can serve it."""
        return self.candidate if self.candidate_on_demand or self.candidate in self.versions else None

    def _parsed(self, model: str) -> VersionId | None:
        """Return the version that a name refers to, whether or not it is loaded.

        Return None unless it is a version of this model, or a version of another model that these engines may load as
        an adapter.
        """
        try:
            version = VersionId.parse(model)
        except NotFoundError:
            return None
        return version if version.name == self.name or version in self.guests else None
