"""Assigns each request for a model's name to either the production version or a rollout's candidate."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol

from serving.protocols.route import Route
from serving.rollout.assigned_requests import unit_text
from svc.store.requests import RequestRecord

_HASH_BYTES = 8


class Mirror(Protocol):
    """Receives finished production requests, in order to send copies of them to the candidate."""

    def wants(self) -> bool:
        """Return whether `offer` should be called when the next request has finished."""

    def offer(self, route: Route, payload: bytes, answer: list[bytes], record: RequestRecord) -> None:
        """Accept a finished request or drop it. Returns immediately.

        Args:
            payload: JSON body for the engine, without `model`.
            answer: production's response body, or the events of its stream.
        """


class Assignment(NamedTuple):
    """The version to which a rollout assigned a request.

    Attributes:
        candidate: whether the candidate answers the request.
        unit: text that the request log stores for the assignment; see `serving.rollout.assigned_requests.unit_text`.
        expects_json: whether the answer should be JSON.
        mirror: object that receives the request after production has answered it, or None if no copy is wanted.
    """

    candidate: bool
    unit: str
    expects_json: bool
    mirror: Mirror | None


@dataclass(frozen=True, slots=True)
class Split:
    """How a rollout splits the requests for a model's name between two versions.

    A user or conversation keeps its version throughout the rollout, except when it moves from production to the
    candidate as the share grows. A hash of the user or conversation and the rollout's id is scaled to a position
    between 0 and 1. The candidate serves all users and conversations whose position is below `share`, which never
    shrinks during a rollout.

    Attributes:
        rollout: id of the rollout. In different rollouts, different users are assigned to the candidate first.
        share: share of users or conversations that the candidate answers, from 0 to 1.
        expects_json: whether the model's answers should be JSON.
        by_request: whether each request is assigned at random, even if its user or conversation is known.
        mirror: object that receives finished production requests, or None if there is no shadow step.
    """

    rollout: int
    share: float
    expects_json: bool = False
    by_request: bool = False
    mirror: Mirror | None = None

    def assign(self, who: str, draw: Callable[[], float]) -> Assignment:
        """Assign a request to a version.

        Args:
            who: user or conversation. If empty (unknown), the request is assigned at random.
            draw: function that returns a random number from 0 to 1, excluding 1.
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
