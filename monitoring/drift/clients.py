"""Limits how many of each client's requests drift checks count, so that one client's batch does not look like drift."""

from collections import Counter, deque

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
