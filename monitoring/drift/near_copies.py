"""Which requests nearly repeat an earlier one: a rephrasing, a retry, a health check. Only the first of them counts.

Words are weighted by their rarity, or a shared template would make all prompts alike (RAG, forms). Nothing here is a
text: words are hashes (svc.drift_reference.item).
"""

import math
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.int32]

MIN_OVERLAP = 0.5
"""Jaccard index of two prompts' words from which they are near copies: of the plain one, and of that which weighs each
word by its rarity."""
COMPARED = 100
"""Kept requests, the newest, that a new one is compared with."""
RARITY_REQUESTS = 1_000
"""Newest requests, kept or not, by which a word is rare; the reference counts too."""
FORGOTTEN_S = 86_400.0
"""A repetition after a day counts again: what is asked every day is part of the traffic."""


class NearCopies:
    """Finds near copies among the requests of a stream.

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

    def remember(self, words: Words, time_s: float, *, kept: bool, seen: bool) -> None:
        """Take a request of an earlier check.

        Args:
            time_s: when it began.
            kept: it was no near copy.
            seen: it is among the newest `RARITY_REQUESTS`.
        """
        found = frozenset(words.tolist())
        if seen:
            self.see(words)
        if kept:
            self._kept.append((found, time_s))

    def is_near_copy(self, words: Words, time_s: float) -> bool:
        """Take the next request, and return whether it nearly repeats one that was kept."""
        found = self.see(words)
        if any(time_s - time < FORGOTTEN_S and self._overlap(found, other) for other, time in self._kept):
            return True
        self._kept.append((found, time_s))
        return False

    def see(self, words: Words) -> frozenset[int]:
        """Take a request that is not compared; return its words."""
        found = frozenset(words.tolist())
        self._newest.append(found)
        self._count(found, 1)
        if len(self._newest) > RARITY_REQUESTS:
            self._count(self._newest.popleft(), -1)
        return found

    def _count(self, words: frozenset[int], change: int) -> None:
        self._requests += change
        for word in words:
            self._requests_with[word] += change

    def _overlap(self, ones: frozenset[int], others: frozenset[int]) -> bool:
        if ones == others:
            return True
        shared = ones & others
        if len(shared) < MIN_OVERLAP * len(ones | others):  # each word as heavy as any other
            return False
        weight = self._weight(shared)
        return weight >= MIN_OVERLAP * (weight + self._weight(ones ^ others))

    def _weight(self, words: Iterable[int]) -> float:
        return sum(math.log((self._requests + 1) / (self._requests_with[word] + 1)) for word in words)
