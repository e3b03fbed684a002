"""Builds the drift features of requests."""

import numpy as np

from svc.store.drift_items import Item
from tests.builders.requests import NOON


def item(request_id: str, *, characters: float = 7.0) -> Item:
    """Return the drift features of a request."""
    return Item(
        request_id,
        NOON,
        prompt={"characters": characters, "language": "de"},
        answer={"answer_tokens": 5.0, "finish_reason": "stop", "valid_json": None},
        topic=np.array([0.25, -1e-9, 3e7], dtype=np.float32),
        wanted=np.array([], dtype=np.float32),
        words=np.array([-(2**31), -1, 2**31 - 1], dtype=np.int32),
        conversation=-(2**63),
    )
