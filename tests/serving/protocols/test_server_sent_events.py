"""Tests that server-sent events are split from chunks with arbitrary boundaries, and parsed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocols.server_sent_events import EventSplitter, data_of, find_error, name_of

TEXT = st.text(max_size=20)
EVENTS = st.lists(
    st.tuples(TEXT, st.sampled_from(["\n\n", "\r\n\r\n"])).map(
        lambda pair: b"data: " + json.dumps({"content": pair[0]}, ensure_ascii=False).encode("utf-8", "replace")
        + pair[1].encode()
    ),
    max_size=8,
)  # fmt: skip


@pytest.mark.slow
@given(EVENTS, st.data())
def test_parsed_events_do_not_depend_on_chunk_boundaries(events: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    splitter = EventSplitter()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[start:end])
    assert found == events


def test_incomplete_event_is_buffered_until_it_is_complete() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: ") == [b"data: 1\n\n"]
    assert splitter.feed(b"2\n\n") == [b"data: 2\n\n"]


def test_multi_line_event_data_is_joined() -> None:
    assert data_of(b": note\nevent: x\ndata: 1\ndata:2\n\n") == b"1\n2"


def test_event_name_is_parsed() -> None:
    assert name_of(b"event: message_stop\r\ndata: 1\r\n\r\n") == "message_stop"
    assert name_of(b"data: event: no\n\n") == ""


def test_error_field_is_recognized_only_at_the_top_level_of_an_event() -> None:
    assert find_error(b'data: {"error":{"message":"no"}}\n\n') == {"message": "no"}
    assert find_error(b'data: {"choices":[{"error":"error"}]}\n\n') is None
    assert find_error(b'data: "error"\n\n') is None
