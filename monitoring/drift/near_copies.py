"""Detects requests that nearly repeat an earlier one, such as rephrasings, retries and health checks.

Of several near copies, only the first counts. Words are weighted by their rarity, because otherwise a
shared template (RAG, forms) would make all prompts similar. No text is stored here: words are hashes
(svc.drift_reference.item).
"""

import math
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

MIN_OVERLAP = 0.5
"""Minimum Jaccard index between the words of two near copies. Both the plain index and the index weighted by word
rarity must reach this minimum."""
COMPARED = 100
"""Number of earlier requests with which each new request is compared. These are the most recent ones that were
not near copies."""
RARITY_REQUESTS = 1_000
"""Number of most recent requests that, together with the reference, determine how rare a word is. Near copies and other
uncounted requests are included."""
FORGOTTEN_S = 86_400.0
"""Seconds after which a repeated request is counted again, instead of being ignored as a near copy. A request that is
sent once a day is normal traffic."""


class NearCopies:
    """Detects near copies in a stream of requests.

    Args:
        reference: the words of each reference prompt.
    """

    def __init__(self, reference: Iterable[Words]) -> None:
        self._requests_with = Counter[int]()
        self._requests = 0
        self._newest = deque[frozenset[int]]()
        self._kept = deque[tuple[frozenset[int], float]](maxlen=COMPARED)
        for words in reference:
            self._count(frozenset(words.tolist()), 1)

    def keep(self, words: Words, time_s: float) -> None:
        """Record a request that an earlier check counted, so that near copies of it are detected.

        Args:
            time_s: start time of the request, in seconds.
        """
        self._kept.append((frozenset(words.tolist()), time_s))

    def is_near_copy(self, words: Words, time_s: float) -> bool:
        """Record the next request, and return whether it is a near copy of a counted request.

        A request that is not a near copy is counted.
        """
        distinct = self.see(words)
        if any(time_s - time < FORGOTTEN_S and self._overlap(distinct, other) for other, time in self._kept):
            return True
        self._kept.append((distinct, time_s))
        return False

    def see(self, words: Words) -> frozenset[int]:
        """Add a request to the statistics from which word rarity is computed, and return its distinct words."""
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
