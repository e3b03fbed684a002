"""What a client's model name means at this moment.

Knows which version is loaded, and nothing of how it got there. A name is resolved after admission, so that a request
which was held through a swap gets the new version.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.hold import EngineUnavailableError
from svc.errors import NotFoundError
from svc.registry.version import Alias, Format, VersionId

SHOWN_CHARS = 100
"""How much of a client's own text comes back in an error."""


class ModelNotFoundError(NotFoundError):
    """A model name that nothing loaded answers to."""


@dataclass(frozen=True, slots=True)
class Served:
    """A version as the engine holds it."""

    version: VersionId
    format: Format


class Routes:
    """The names that clients may use: `NAME`, `NAME@N` of the loaded version, `NAME@production`.

    Args:
        name: the served model name, without a version; also what the engine itself calls its model.
        clock: Unix time, seconds.
    """

    def __init__(self, name: str, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self._clock = clock
        self._served: Served | None = None
        self._since = 0

    @property
    def served(self) -> Served | None:
        """What is loaded; None before the first version is."""
        return self._served

    @property
    def since(self) -> int:
        """When it was loaded, Unix seconds."""
        return self._since

    def serve(self, served: Served) -> None:
        """From now on every name means this version. Called with the door closed or the engine unavailable."""
        self._served = served
        self._since = int(self._clock())

    def names(self) -> tuple[str, ...]:
        """The names that resolve now."""
        if self._served is None:
            return ()
        return self.name, str(self._served.version), f"{self.name}@{Alias.PRODUCTION}"

    def resolve(self, model: str) -> Served:
        """The version that a client's model name means.

        Raises:
            ModelNotFoundError: no loaded version answers to it.
            EngineUnavailableError: nothing is loaded yet.
        """
        if self._served is None:
            raise EngineUnavailableError("no version is loaded yet", todo="send the request again later")
        if model not in self.names():
            raise ModelNotFoundError(
                f"model {model[:SHOWN_CHARS]!r} is not served here", expected=f"one of {', '.join(self.names())}"
            )
        return self._served
