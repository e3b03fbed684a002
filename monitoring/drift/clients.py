"""Limit each client to about its usual share, so that a batch from one client does not look like changed traffic."""

from collections import Counter, deque

COMPARED = 100
"""Number of newest counted requests in which each client's share is limited."""
_MIN_COUNT = 5
"""Number of counted requests that every client may have, whatever its share."""
_SLACK = 1.2
"""Factor by which a client may exceed its share."""


class ClientShares:
    """Limits each client's counted requests to its share of the requests seen before.

    Args:
        seen: clients of the newest requests, counted or not, oldest first; the newest `COMPARED` are ignored, since
            they may be a batch.
        kept: clients of the newest counted requests.
        most_seen: number of seen requests that determine the shares.
    """

    def __init__(self, seen: list[str], kept: list[str], most_seen: int) -> None:
        self._most = most_seen
        self._newest = deque(seen[-COMPARED:])
        self._earlier = deque(seen[:-COMPARED][-most_seen:])
        self._counts = Counter(self._earlier)
        self._kept = deque(kept[-COMPARED:], maxlen=COMPARED)
        self._kept_counts = Counter(self._kept)

    def may_count(self, client: str) -> bool:
        """Add the client of the next request; return whether the request is within its client's share.

        Every request is, until `COMPARED` requests are known before the newest `COMPARED`.

        Args:
            client: empty if unknown; then the request is always within the share.
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
        """Add the client of a counted request."""
        if len(self._kept) == COMPARED:
            self._kept_counts[self._kept[0]] -= 1
        self._kept.append(client)
        self._kept_counts[client] += 1
