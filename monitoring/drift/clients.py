"""How much one client may count: about its usual share, or a batch of one would look like a change of traffic."""

from collections import Counter, deque

COMPARED = 100
"""Kept requests, the newest, of which a client has a share."""
_MIN_COUNT = 5
"""Of those, which any client may have."""
_SLACK = 1.2


class ClientShares:
    """Limits the requests of each client to its share among the requests seen before.

    Args:
        seen: clients of the newest requests, kept or not, oldest first; the newest `COMPARED` say nothing yet, since
            they may be a batch.
        kept: clients of the newest kept requests.
    """

    def __init__(self, seen: list[str], kept: list[str], most_seen: int) -> None:
        self._most = most_seen
        self._newest = deque(seen[-COMPARED:])
        self._earlier = deque(seen[:-COMPARED][-most_seen:])
        self._counts = Counter(self._earlier)
        self._kept = deque(kept[-COMPARED:], maxlen=COMPARED)
        self._kept_counts = Counter(self._kept)

    def may_count(self, client: str) -> bool:
        """Take the client of the next request; return whether the request is within its share.

        Args:
            client: empty where nobody knows: such a request is.
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
        """Take the client of a request that counts."""
        if len(self._kept) == COMPARED:
            self._kept_counts[self._kept[0]] -= 1
        self._kept.append(client)
        self._kept_counts[client] += 1
