"""Assigns the requests for a model's name to the production version or to the candidate of a rollout."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from serving.protocols.route import Route
from svc.store.requests import RequestRecord
from svc.store.rollouts import unit_text

_HASH_BYTES = 8


class Mirror(Protocol):
    """Receives finished production requests, to send copies of them to the candidate."""

    def wants(self) -> bool:
        """Return whether the next request should be offered."""

    def offer(self, route: Route, payload: bytes, answer: list[bytes], record: RequestRecord) -> None:
        """Take a finished request, or drop it; return immediately.

        Args:
            payload: JSON for the engine, without `model`.
            answer: body or events of production's answer.
        """


class Assignment(NamedTuple):
    """The version to which a rollout assigned a request.

    Attributes:
        candidate: whether the candidate answers it.
        unit: text by which the request log records the assignment, see `svc.store.rollouts.unit_text`.
        expects_json: whether the answer should be JSON.
        mirror: receives the request after production has answered it; None if no copy is wanted.
    """

    candidate: bool
    unit: str
    expects_json: bool
    mirror: Mirror | None


@dataclass(frozen=True, slots=True)
class Split:
    """How a rollout divides the requests for a model's name.

    A user or conversation keeps its version for the whole rollout: its position depends only on the rollout and its
    name, and the candidate answers all positions below its share, which never shrinks.

    Attributes:
        rollout: id of the rollout; different rollouts begin with different users.
        share: share of users or conversations that the candidate answers, from 0 to 1.
        expects_json: whether the model's answers should be JSON.
        by_request: assign every request by itself.
        mirror: receives finished production requests; None outside the shadow step.
    """

    rollout: int
    share: float
    expects_json: bool = False
    by_request: bool = False
    mirror: Mirror | None = None

    def assign(self, who: str, draw: Callable[[], float]) -> Assignment:
        """Return the version for a request.

        Args:
            who: user or conversation; empty if unknown, so that the request is assigned by itself.
            draw: returns a random number from 0 to 1, excluding 1.
        """
        if who and not self.by_request:
            text = f"{self.rollout}\0{who}".encode("utf-8", "surrogatepass")
            digest = blake2b(text, digest_size=_HASH_BYTES).digest()
            position, unit = int.from_bytes(digest) / float(1 << 8 * _HASH_BYTES), digest.hex()
        else:
            position, unit = draw(), ""
        mirror = self.mirror if self.mirror and self.mirror.wants() else None
        candidate = position < self.share
        return Assignment(candidate, unit_text(self.rollout, unit, candidate=candidate), self.expects_json, mirror)
