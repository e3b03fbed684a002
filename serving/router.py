"""Which of a server's models a request is for, and which of its backends answers it.

A name means one backend, or several with weights: those of a split. Who asks again, by `user` or in the same
conversation, comes to the same one. Which version a backend then answers with is settled after admission.
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
    """What answers the requests of one model."""

    @property
    def names(self) -> ModelNames:
        """What clients call it."""

    @property
    def admission(self) -> Admission:
        """Who may run in it."""

    @property
    def context(self) -> int:
        """Longest prompt and answer together, tokens: what an answer may take that the client sets no limit to."""

    async def check(self, model: str) -> None:
        """Raises where a name means nothing, also where only the registry knows that."""

    def lease(self, model: str, *, without: Lease | None = None) -> AbstractAsyncContextManager[Lease]:
        """An engine for the body; see serving.replicas.balancer.Balancer.lease."""

    def admitted(
        self, model: str, tokens: int, party: Party, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AbstractAsyncContextManager[Lease]:
        """An engine for the body, once admission lets the request run; see AdmittedLease."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a name's requests.

    Attributes:
        backend: answers them.
        weight: its share of the sum of all.
        version: with which; None for whichever is in production.
    """

    backend: Backend
    weight: float = 1.0
    version: VersionId | None = None


class Destination(NamedTuple):
    """Where a request goes.

    Attributes:
        model: the name by which it is leased there.
    """

    backend: Backend
    model: str


class Router:
    """The names of all models that a server serves.

    Args:
        draw: a number below 1, at random, for requests of which nobody knows who asks.
    """

    def __init__(self, *, draw: Callable[[], float] = random.random) -> None:
        self._draw = draw
        self._shares: dict[str, tuple[Share, ...]] = {}
        self._registered: Collection[str] = ()

    def serve(self, name: str, shares: Sequence[Share]) -> None:
        """From now on a model's requests go to these.

        Raises:
            ValueError: no share, or none with a weight.
        """
        if not any(share.weight > 0 for share in shares) or any(share.weight < 0 for share in shares):
            raise ValueError(f"the shares of {name} have the weights {[share.weight for share in shares]}")
        self._shares[name] = tuple(shares)

    def remove(self, name: str) -> None:
        """From now on nothing answers to a name."""
        self._shares.pop(name, None)

    def set_registered(self, names: Collection[str]) -> None:
        """Tells which models there are beside those that are served, for the error."""
        self._registered = names

    @property
    def served(self) -> list[str]:
        """The models that are served, or shall be once their engines have started."""
        return list(self._shares)

    @property
    def backends(self) -> list[Backend]:
        """All that answer, each once."""
        found = [share.backend for shares in self._shares.values() for share in shares]
        return list({id(backend): backend for backend in found}.values())

    @property
    def only_version(self) -> VersionId | None:
        """The version in production, where one model is served."""
        served = [backend.names.served for backend in self.backends]
        return served[0].version if len(served) == 1 and served[0] else None

    @property
    def versions(self) -> set[VersionId]:
        """The versions of all models that are in production or loaded."""
        return {version for backend in self.backends for version in backend.names.versions}

    def names(self) -> tuple[str, ...]:
        """The names that resolve now."""
        return tuple(name for backend in self.backends for name in backend.names.all())

    def served_name(self, model: str) -> str | None:
        """The model that a request is for, also one that cannot be asked now; None where it is not served.

        Args:
            model: as the client names it.
        """
        name = model.partition("@")[0]
        return name if name in self._shares else None

    def find(self, model: str, who: str = "") -> Destination:
        """The backend for a request.

        Args:
            model: as the client names it.
            who: what tells one client or conversation from another; empty where nobody knows.

        Raises:
            ModelNotFoundError: none answers to the name.
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
        return max(shares, key=lambda share: share.weight)  # what floating point left over

    def _unknown(self, model: str, name: str) -> ModelNotFoundError:
        served = f"one of {', '.join(self.names()) or 'none yet'}"
        shown = f"model {model[:SHOWN_CHARS]!r}"
        if name in self._registered:
            todo = f"ask the operator for it: svc add {name}"
            return ModelNotFoundError(f"{shown} is registered, but not served", expected=served, todo=todo)
        return ModelNotFoundError(f"{shown} is not served here", expected=served)


def _position(name: str, who: str) -> float:
    """Where somebody stands among all, from 0 to 1: the same in every server and at every time."""
    digest = blake2b(f"{name}\0{who}".encode("utf-8", "surrogatepass"), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest) / float(1 << 8 * _HASH_BYTES)
