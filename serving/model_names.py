"""The names of one served model, and what each means at this moment.

Knows which versions are loaded, and nothing of how they got there. A name is resolved after admission, so that a
request which was queued through a swap gets the new version. Which model a request is for, the router says.
"""

import time
from collections.abc import Callable

from serving.admission.errors import EngineUnavailableError
from svc.errors import NotFoundError
from svc.version import Alias, Format, Target, VersionId

SHOWN_CHARS = 100
"""How much of a client's own text comes back in an error."""


class ModelNotFoundError(NotFoundError):
    """A model name that nothing loaded answers to."""


class ModelNames:
    """The names that clients may use: `NAME`, `NAME@production`, `NAME@N` of each loaded version; of any as an adapter.

    Args:
        name: the served model name, without a version.
        clock: Unix time, seconds.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self._in_production = frozenset({name, f"{name}@{Alias.PRODUCTION}"})
        self._clock = clock
        self._served: Target | None = None
        self._loaded: set[Target] = set()
        self._since = 0

    @property
    def served(self) -> Target | None:
        """The version in production; None before the first is."""
        return self._served

    @property
    def since(self) -> int:
        """When it came there, Unix seconds."""
        return self._since

    def serve(self, served: Target) -> None:
        """From now on this version is the one in production."""
        if served != self._served:
            self._served, self._since = served, int(self._clock())

    def set_loaded(self, loaded: set[Target]) -> None:
        """From now on engines hold these versions: two during a swap of several engines."""
        self._loaded = loaded

    @property
    def versions(self) -> set[VersionId]:
        """The version in production and those that are loaded."""
        return {target.version for target in (self._served, *self._loaded) if target}

    def all(self) -> tuple[str, ...]:
        """Those that resolve now."""
        if self._served is None:
            return ()
        return self.name, *map(str, sorted(self.versions)), f"{self.name}@{Alias.PRODUCTION}"

    def resolve(self, model: str) -> VersionId | None:
        """The version that a client's model name means; None for whichever an engine holds that takes requests.

        Where versions are served as adapters it may be one that is not loaded yet, or that there is not.

        Raises:
            ModelNotFoundError: no version answers to it.
            EngineUnavailableError: nothing is loaded yet.
        """
        if self._served is None:
            raise EngineUnavailableError("no version is loaded yet", todo="send the request again later")
        if model in self._in_production:
            return None
        for loaded in self._loaded:
            if model == str(loaded.version):
                return loaded.version
        if self._served.format is Format.ADAPTER and (version := self._parsed(model)):
            return version
        raise ModelNotFoundError(
            f"model {model[:SHOWN_CHARS]!r} is not served here", expected=f"one of {', '.join(self.all())}"
        )

    def _parsed(self, model: str) -> VersionId | None:
        """Any version of the name, where those that are not loaded can be loaded as adapters."""
        try:
            version = VersionId.parse(model)
        except NotFoundError:
            return None
        return version if version.name == self.name else None
