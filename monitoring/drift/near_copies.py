"""Detect requests that nearly repeat an earlier one (rephrasings, retries, health checks). Only the first one counts.

Words are weighted by their rarity; otherwise a shared template (RAG, forms) would make all prompts similar. No text is
stored here: words are hashes (svc.drift_reference.item).
"""

import math
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

MIN_OVERLAP = 0.5
"""Minimum Jaccard index of two near copies' words; both the plain index and the index weighted by rarity must reach
this minimum."""
COMPARED = 100
"""Number of newest counted requests with which a new request is compared."""
RARITY_REQUESTS = 1_000
"""Number of newest requests, counted or not, from which rarity is computed, together with the reference."""
FORGOTTEN_S = 86_400.0
"""A repetition after a day counts again: daily requests are part of the traffic."""


class NearCopies:
    """Near-copy detection on a stream of requests.

    Args:
        reference: words of each prompt of the reference.
    """

    def __init__(self, reference: Iterable[Words]) -> None:
        self._requests_with = Counter[int]()
        self._requests = 0
        self._newest = deque[frozenset[int]]()
        self._kept = deque[tuple[frozenset[int], float]](maxlen=COMPARED)
        for words in reference:
            self._count(frozenset(words.tolist()), 1)

    def keep(self, words: Words, time_s: float) -> None:
        """Add a request that an earlier check counted.

        Args:
            time_s: start of the request.
        """
        self._kept.append((frozenset(words.tolist()), time_s))

    def is_near_copy(self, words: Words, time_s: float) -> bool:
        """Add the next request; return whether it nearly repeats a counted one. If not, it is counted itself."""
        distinct = self.see(words)
        if any(time_s - time < FORGOTTEN_S and self._overlap(distinct, other) for other, time in self._kept):
            return True
        self._kept.append((distinct, time_s))
        return False

    def see(self, words: Words) -> frozenset[int]:
        """Add a request without comparing it; return its distinct words."""
        distinct = frozenset(words.tolist())
        self._newest.append(distinct)
        self._count(distinct, 1)
        if len(self._newest) > RARITY_REQUESTS:
            self._count(self._newest.popleft(), -1)
        return distinct

    def _count(self, words: frozenset[int], change: int) -> None:
        self._requests += change
        for word in words:
            self._requests_with[word] += change

    def _overlap(self, ones: frozenset[int], others: frozenset[int]) -> bool:
        if ones == others:
            return True
        shared = ones & others
        if len(shared) < MIN_OVERLAP * len(ones | others):  # unweighted
            return False
        weight = self._weight(shared)
        return weight >= MIN_OVERLAP * (weight + self._weight(ones ^ others))

    def _weight(self, words: Iterable[int]) -> float:
        return sum(math.log((self._requests + 1) / (self._requests_with[word] + 1)) for word in words)
