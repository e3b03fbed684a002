"""How far items of a stream depend on those before them: runs of one topic, one client's bursts, conversations."""

import numpy as np
from numpy.typing import NDArray

MAX_LAG = 64
"""Items; what depends over more is a change of the stream."""
_FAR_LAGS = 38
"""Lags beyond `MAX_LAG`, at which items are as alike as any two."""
LAGS = MAX_LAG + _FAR_LAGS
ROWS = 600
"""Items by which it is judged, all before the newest `MAX_LAG`: a change that begins makes the newest alike."""
MIN_ROWS = 60
_SURE = 2.5
"""Standard errors beyond which items at a lag are more alike."""


def dependence(among: NDArray[np.float32], stop: int, conversations: NDArray[np.int64]) -> float | None:
    """Return within how many items those of a stream depend on each other, at least 1; None of too few.

    It is the largest lag up to which items are more alike than at lags beyond 64, plus 1, or the size of the
    conversation that the typical item is part of, whichever is larger.

    Args:
        among: how alike items are, of each with those before it.
        stop: place after the last item that counts.
        conversations: which conversation each item belongs to.
    """
    stop -= MAX_LAG
    start = max(LAGS, stop - ROWS)
    if stop - start < MIN_ROWS:
        return None
    rows = np.stack([among[place, place - LAGS : place][::-1] for place in range(start, stop)])
    more = rows[:, :MAX_LAG] - rows[:, MAX_LAG:].mean(axis=1, keepdims=True)
    surely = more.mean(axis=0) > _SURE * (more.std(axis=0) / np.sqrt(len(rows)) + 1e-12)
    lags = MAX_LAG if surely.all() else int(surely.argmin())
    _, sizes = np.unique(conversations[start:stop], return_counts=True)
    return float(max(1 + lags, (sizes**2).sum() / sizes.sum()))
