"""Chooses the model and the backend of a request.

A name has one backend, or several with weights for a traffic split. Requests of the same `user` or conversation go to
the same backend. The backend's version is chosen after admission.
"""

import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from serving.admission.admission import Admission
from serving.admission.party import Party
from serving.model_names import SHOWN_CHARS, ModelNames, ModelNotFoundError
from serving.replicas.balancer import Lease
from svc.version import VersionId

_HASH_BYTES = 8


class Backend(Protocol):
    """Answers the requests of one model."""

    @property
    def names(self) -> ModelNames:
        """The names that clients may use."""

    @property
    def admission(self) -> Admission:
        """Admission to the model's engines."""

    @property
    def context(self) -> int:
        """Maximum length of prompt and answer together, tokens; limits an answer without a limit of its own."""

    async def check(self, model: str) -> None:
        """Check that a model name can be served; reads the registry only if necessary.

        Raises:
            ModelNotFoundError: no version has this name.
            EngineUnavailableError: nothing is loaded yet.
        """

    def lease(self, model: str, *, without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine for the body; see serving.replicas.balancer.Balancer.lease."""

    def admitted(
        self, model: str, tokens: int, party: Party, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[Lease]:
        """Lease an engine for the body, after admission; see AdmittedLease."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a name's requests.

    Attributes:
        backend: the backend that answers them.
        weight: its share of the sum of all weights.
        version: the version that answers; None for the one in production.
    """

    backend: Backend
    weight: float = 1.0
    version: VersionId | None = None


class Destination(NamedTuple):
    """The backend of a request.

    Attributes:
        model: the model name for the lease.
    """

    backend: Backend
    model: str


class Router:
    """The names of all models that a server serves.

    Args:
        draw: returns a random number below 1, for requests whose client is unknown.

    Attributes:
        registered: names of registered models, for errors about those that are not served.
    """

    def __init__(self, *, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._shares: dict[str, tuple[Share, ...]] = {}
        self.registered: Collection[str] = ()

    def serve(self, name: str, shares: Sequence[Share]) -> None:
        """Set the shares of a model's requests.

        Raises:
            ValueError: there are no shares, all weights are 0, or a weight is negative.
        """
        if not any(share.weight > 0 for share in shares) or any(share.weight < 0 for share in shares):
            raise ValueError(f"the shares of {name} have invalid weights: {[share.weight for share in shares]}")
        self._shares[name] = tuple(shares)

    def remove(self, name: str) -> None:
        """Stop routing a name."""
        self._shares.pop(name, None)

    @property
    def served(self) -> list[str]:
        """The models that are served, or will be after their engines have started."""
        return list(self._shares)

    @property
    def backends(self) -> list[Backend]:
        """All backends, each once."""
        backends = [share.backend for shares in self._shares.values() for share in shares]
        return list({id(backend): backend for backend in backends}.values())

    @property
    def only_version(self) -> VersionId | None:
        """The version in production if only one model is served; None otherwise."""
        served = [backend.names.served for backend in self.backends]
        return served[0].version if len(served) == 1 and served[0] else None

    @property
    def versions(self) -> set[VersionId]:
        """The versions of all models that are in production or loaded."""
        return {version for backend in self.backends for version in backend.names.versions}

    def names(self) -> tuple[str, ...]:
        """Return the names that resolve now."""
        return tuple(name for backend in self.backends for name in backend.names.all())

    def served_name(self, model: str) -> str | None:
        """Return the name of a request's model, even if it is unavailable now; None if it is not served."""
        name = model.partition("@")[0]
        return name if name in self._shares else None

    def find(self, model: str, who: str = "") -> Destination:
        """Return the backend for a request.

        Args:
            model: model name as the client sent it.
            who: identifies a client or conversation; empty if unknown.

        Raises:
            ModelNotFoundError: no backend has this name.
            EngineUnavailableError: no version is loaded yet.
        """
        name = model.partition("@")[0]
        shares = self._shares.get(name)
        if shares is None:
            raise self._unknown(model, name)
        if len(shares) > 1 and model == name:
            share = self._drawn(name, shares, who)
            return Destination(share.backend, str(share.version) if share.version else model)
        last = shares[-1].backend
        for backend in (share.backend for share in shares if share.backend is not last):
            if model in backend.names.all():
                return Destination(backend, model)
        last.names.resolve(model)
        return Destination(last, model)

    def _drawn(self, name: str, shares: Sequence[Share], who: str) -> Share:
        at = _position(name, who) if who else self._draw()
        at *= sum(share.weight for share in shares)
        for share in shares:
            at -= share.weight
            if at < 0:
                return share
        return max(shares, key=lambda share: share.weight)  # a rounding error left a rest

    def _unknown(self, model: str, name: str) -> ModelNotFoundError:
        names = ", ".join(self.names())
        served = f"one of {names}" if names else "a served model; there is none yet"
        shown = f"model {model[:SHOWN_CHARS]!r}"
        if name in self.registered:
            todo = f"ask the operator to add it: svc add {name}"
            return ModelNotFoundError(f"{shown} is registered, but not served", expected=served, todo=todo)
        return ModelNotFoundError(f"{shown} is not served here", expected=served)


def _position(name: str, who: str) -> float:
    """Return a number from 0 to 1 that depends only on the model name and the client."""
    digest = blake2b(f"{name}\0{who}".encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest) / float(1 << 8 * _HASH_BYTES)
