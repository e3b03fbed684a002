"""Compares a version's requests with its reference, decides which requests count, and starts and ends alarms.

This module is pure: it has no store and no clock, and its state is passed in as a value. Benchmarks and
tests can therefore replay streams through the same code that watches live traffic.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.bets import feature_bets, hit_table
from monitoring.drift.budget import FALSE_ALARMS_PER_REQUEST, SIGNAL_SHARES, Signal
from monitoring.drift.dependence import ENOUGH, LAGS, MAX_LAG, ROWS, Resemblance
from monitoring.drift.domain_classifier import (
    CLASSIFIER,
    HISTORY,
    LEARNED_FROM,
    DomainClassifier,
    Similarities,
    Singles,
)
from monitoring.drift.evidence import Event, Evidence, FeatureState, Hits
from monitoring.drift.near_copies import RARITY_REQUESTS, NearCopies, Words
from svc.drift_reference.sample import Floats, Sample

COMPARED = 100
"""Number of requests most recently counted by the drift check, to which the limit on each client's share applies."""
_MIN_COUNT = 5
"""Every client is allowed at least this many of the last `COMPARED` counted requests, however small its usual share
is."""
_SLACK = 1.2
"""A client's share of the counted requests may be at most its usual share multiplied by this factor."""


class ClientShares:
    """Decides which requests the drift check counts, so that no client has a much larger share of them than of earlier
    traffic.

    Args:
        seen: clients of the newest requests, counted or not, oldest first. The newest `COMPARED` are
            ignored, since they may all come from one batch.
        kept: clients of the newest counted requests.
        most_seen: maximum number of seen requests from which the shares are computed.
    """

    def __init__(self, seen: list[str], kept: list[str], most_seen: int) -> None:
        self._most = most_seen
        self._newest = deque(seen[-COMPARED:])
        self._earlier = deque(seen[:-COMPARED][-most_seen:])
        self._counts = Counter(self._earlier)
        self._kept = deque(kept[-COMPARED:], maxlen=COMPARED)
        self._kept_counts = Counter(self._kept)

    def may_count(self, client: str) -> bool:
        """Record the next request's client, and return whether the request may be counted. It may not be counted if
        the client already has its maximum share of the counted requests.

        Until `2 * COMPARED` requests have been seen, every request may be counted.

        Args:
            client: the request's client. If it is unknown, pass an empty string; the request may then always be
                counted.
        """
        self._newest.append(client)
        if len(self._newest) > COMPARED:
            earlier = self._newest.popleft()
            self._earlier.append(earlier)
            self._counts[earlier] += 1
            if len(self._earlier) > self._most:
                self._counts[self._earlier.popleft()] -= 1
        share = self._counts[client] / len(self._earlier) if len(self._earlier) >= COMPARED else 1.0
        return not client or self._kept_counts[client] < max(_MIN_COUNT, _SLACK * share * COMPARED)

    def keep(self, client: str) -> None:
        """Record the client of a request that the drift check has counted."""
        if len(self._kept) == COMPARED:
            self._kept_counts[self._kept[0]] -= 1
        self._kept.append(client)
        self._kept_counts[client] += 1


MEMORY = max(ROWS + LAGS, HISTORY + max(LEARNED_FROM)) + MAX_LAG
"""Number of earlier counted requests needed to process new requests. All requests are counted except near copies and
requests above a client's usual share."""
SEEN = RARITY_REQUESTS + COMPARED
"""Number of earlier requests used to compute word rarity and each client's share. They include requests that are not
counted (see `MEMORY`)."""
_LEARNED_SHARE = 0.7
"""Share of the prompts' false alarm budget that is spent on bets on learned sets of prompts. The domain classifier
learns these sets to detect changes that no single feature shows. The rest of the budget is divided equally among all
other bets on prompts."""
_JUDGE_EVERY = 20
"""Number of items after which the dependence distance (see `monitoring.drift.dependence`) is re-estimated."""


@dataclass(frozen=True)
class Requests:
    """A sequence of requests; each attribute has one entry per request.

    Attributes:
        prompts: features of the prompts, including text embeddings.
        answers: features of the answers.
        words: hashes of each prompt's words.
        conversations: hash of each request's conversation.
        times: start time of each request, in seconds since 1970.
        clients: the client of each request, or an empty string if unknown.
    """

    prompts: Sample
    answers: Sample
    words: Sequence[Words]
    conversations: NDArray[np.int64]
    times: Floats
    clients: Sequence[str]

    @property
    def size(self) -> int:
        return self.prompts.size

    def at(self, places: NDArray[np.intp]) -> "Requests":
        """Return the requests at the given indexes, in the given order."""
        return Requests(
            self.prompts.at(places),
            self.answers.at(places),
            [self.words[place] for place in places],
            self.conversations[places],
            self.times[places],
            [self.clients[place] for place in places],
        )

    def followed_by(self, others: "Requests") -> "Requests":
        """Return a sequence of these requests followed by `others`."""
        return Requests(
            self.prompts.followed_by(others.prompts),
            self.answers.followed_by(others.answers),
            [*self.words, *others.words],
            np.concatenate([self.conversations, others.conversations]),
            np.concatenate([self.times, others.times]),
            [*self.clients, *others.clients],
        )


class Seen(NamedTuple):
    """A request that arrived before the current check. Requests that are not counted (see `MEMORY`) are included."""

    words: Words
    client: str


@dataclass(frozen=True)
class Baseline:
    """The reference for comparing requests.

    Attributes:
        prompts: features of the prompts, including text embeddings.
        words: hashes of each prompt's words.
        answers: features of the answers, most of which are answers to prompts that are not in `prompts`.
    """

    prompts: Sample
    words: Sequence[Words]
    answers: Sample


@dataclass(frozen=True, slots=True)
class Watch:
    """The state of drift detection on a stream, carried over from one check to the next.

    Attributes:
        kept: number of counted requests.
        dependence: distance within which requests depend on each other, as a number of counted requests.
        steady_since: position of the last request counted during an alarm, or 0 if there was no alarm.
        features: state of the bets on each feature.
        newest_kept: one digit for each of the newest requests, newest last: 1 if the request was counted, else 0.
    """

    kept: int = 0
    dependence: float = MAX_LAG
    steady_since: int = 0
    features: Mapping[str, FeatureState] = field(default_factory=dict)
    newest_kept: str = ""


@dataclass(frozen=True)
class Advance:
    """Result of processing new requests.

    A request is counted if it is not a near copy and is within its client's share.

    Attributes:
        watch: the state after the new requests.
        kept: indexes of the new requests that were counted.
        events: alarms that started or ended. An event's position is its request's position among all counted requests.
        strengths: evidence for a change in each feature, see `Evidence.strengths`.
    """

    watch: Watch
    kept: NDArray[np.intp]
    events: Sequence[Event]
    strengths: Mapping[str, float]


class Detector:
    """Detects changes in a version's traffic by betting. A detector holds the reference but no stream state.

    Args:
        baseline: the reference. Near copies in it count only once, as they do in traffic.
    """

    def __init__(self, baseline: Baseline) -> None:
        copies = NearCopies(baseline.words)
        once = [place for place, words in enumerate(baseline.words) if not copies.is_near_copy(words, 0.0)]
        self._words = [baseline.words[place] for place in once]
        self.prompts, self.answers = baseline.prompts.at(np.array(once, dtype=np.intp)), baseline.answers
        self.classifier = DomainClassifier(self.prompts)
        self._resemblance = Resemblance(self.classifier.usual, (self.prompts, self.answers))
        self._prompt_bets, self._answer_bets = feature_bets(self.prompts), feature_bets(self.answers)
        self._fixed_bounds = np.concatenate(
            [self.classifier.far_bounds, [bet.bound for bet in (*self._prompt_bets, *self._answer_bets)]]
        )
        self.signals: dict[str, Signal] = {
            CLASSIFIER: Signal.INPUT,
            **dict.fromkeys((bet.feature for bet in self._prompt_bets), Signal.INPUT),
            **dict.fromkeys((bet.feature for bet in self._answer_bets), Signal.OUTPUT),
        }

    @property
    def _features(self) -> list[str]:
        classifier = [CLASSIFIER] * (self.classifier.learned + len(self.classifier.far_bounds))
        return [*classifier, *(bet.feature for bet in (*self._prompt_bets, *self._answer_bets))]

    @property
    def _weights(self) -> Floats:
        learned, fixed = self.classifier.learned, len(self.classifier.far_bounds) + len(self._prompt_bets)
        return np.concatenate(
            [
                np.full(learned, SIGNAL_SHARES[Signal.INPUT] * _LEARNED_SHARE / learned),
                np.full(fixed, SIGNAL_SHARES[Signal.INPUT] * (1 - _LEARNED_SHARE) / fixed),
                np.full(len(self._answer_bets), SIGNAL_SHARES[Signal.OUTPUT] / max(1, len(self._answer_bets))),
            ]
        )

    def advance(self, watch: Watch, before: Requests, seen_before: Sequence[Seen], new: Requests) -> Advance:
        """Process new requests, and return the new state and the alarms that started or ended.

        Args:
            watch: the state before the new requests.
            before: the newest earlier requests that were counted (see `MEMORY`), at most `MEMORY` of them.
            seen_before: the newest earlier requests, including those that were not counted.
        """
        kept = self._keep(before, seen_before, new)
        added = new.at(kept)
        requests = before.followed_by(added)
        similar = Similarities(
            self.classifier.similar(requests.prompts, requests.prompts), self.classifier.similar(requests.prompts)
        )
        alike = self._resemblance.of(similar.among, (requests.prompts, requests.answers))
        fixed = self._fixed_hits(similar.reference[before.size :], added)
        evidence = Evidence(self._features, self._weights, 1 / FALSE_ALARMS_PER_REQUEST, watch.features)
        events = list[Event]()
        position, depends, steady_since = watch.kept, watch.dependence, watch.steady_since
        for place in range(before.size, requests.size):
            position += 1
            learned, bounds = self.classifier.learned_hits(similar, place, depends)
            hits = np.concatenate([learned, fixed[place - before.size]])
            bounds = np.concatenate([bounds, self._fixed_bounds])
            events += evidence.add(position, hits, bounds, depends)
            if evidence.in_alarm:  # changed items are similar to each other; that is not dependence
                steady_since = position
            steady = position - steady_since
            if position % _JUDGE_EVERY == 0 and (steady_since == 0 or steady >= ENOUGH):
                depends = alike.dependence(max(0, place + 1 - steady), place + 1, requests.conversations)
        flags = np.zeros(new.size, dtype=int)
        flags[kept] = 1
        newest = (watch.newest_kept + "".join(map(str, flags)))[-RARITY_REQUESTS:]
        watch = Watch(position, depends, steady_since, evidence.states(), newest)
        return Advance(watch, kept, events, evidence.strengths())

    def _keep(self, before: Requests, seen_before: Sequence[Seen], new: Requests) -> NDArray[np.intp]:
        """Return the indexes of the new requests that are used as evidence.

        Near copies of other requests are not used, nor are requests beyond their client's usual share of the traffic.
        """
        copies = NearCopies(self._words)
        clients = ClientShares([seen.client for seen in seen_before], list(before.clients), RARITY_REQUESTS)
        for seen in seen_before[-RARITY_REQUESTS:]:
            copies.see(seen.words)
        for words, time in zip(before.words, before.times, strict=True):
            copies.keep(words, float(time))
        kept = []
        for place, (words, time, client) in enumerate(zip(new.words, new.times, new.clients, strict=True)):
            if not clients.may_count(client):
                copies.see(words)
            elif not copies.is_near_copy(words, float(time)):
                clients.keep(client)
                kept.append(place)
        return np.array(kept, dtype=np.intp)

    def _fixed_hits(self, to_reference: Singles, new: Requests) -> Hits:
        """Return a table (new requests x bets) that shows which requests are in the fixed set of each bet."""
        parts = [self.classifier.far_hits(to_reference), hit_table(self._prompt_bets, new.prompts)]
        return np.concatenate([*parts, hit_table(self._answer_bets, new.answers)], axis=1)
