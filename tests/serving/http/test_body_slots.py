"""Tests the limits on concurrently received bodies, in total and per peer."""

import pytest

from serving.admission.errors import OverloadedError
from serving.http.body_slots import BodySlots


def test_number_of_bodies_received_concurrently_is_limited_by_the_slots() -> None:
    slots = BodySlots(2)
    with slots.reading("one"):
        with slots.reading("other"), pytest.raises(OverloadedError), slots.reading("third"):
            pass
        with slots.reading("third"):
            pass


def test_one_peer_gets_at_most_half_of_the_body_slots() -> None:
    slots = BodySlots(4)
    with slots.reading("slow"), slots.reading("slow"):
        with pytest.raises(OverloadedError, match="2 of them from slow"), slots.reading("slow"):
            pass
        with slots.reading("other"):
            pass
    with slots.reading("slow"):
        pass
