"""How many bodies may come in at once, of all and of one peer."""

import pytest

from serving.admission.errors import OverloadedError
from serving.http.body_slots import BodySlots


def test_as_many_come_in_at_once_as_there_are_places() -> None:
    slots = BodySlots(2)
    with slots.reading("one"):
        with slots.reading("other"), pytest.raises(OverloadedError), slots.reading("third"):
            pass
        with slots.reading("third"):
            pass


def test_one_peer_sends_half_of_them() -> None:
    slots = BodySlots(4)
    with slots.reading("slow"), slots.reading("slow"):
        with pytest.raises(OverloadedError, match="2 of them from slow"), slots.reading("slow"):
            pass
        with slots.reading("other"):
            pass
    with slots.reading("slow"):
        pass
