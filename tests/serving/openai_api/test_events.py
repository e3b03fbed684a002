"""Events cut from chunks that end anywhere, and what is found in them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.openai_api.events import (
    EventSplitter,
    Usage,
    data_of,
    find_error,
    find_usage,
    is_done,
    is_token,
    is_usage_only,
)

TEXT = st.text(max_size=20)
EVENTS = st.lists(
    st.tuples(TEXT, st.sampled_from(["\n\n", "\r\n\r\n"])).map(
        lambda pair: b"data: " + json.dumps({"content": pair[0]}, ensure_ascii=False).encode("utf-8", "replace")
        + pair[1].encode()
    ),
    max_size=8,
)  # fmt: skip


@given(EVENTS, st.data())
def test_events_are_the_same_wherever_the_chunks_end(events: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    splitter = EventSplitter()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[start:end])
    assert found == events
    assert splitter.rest == b""


def test_an_event_that_is_not_complete_is_kept_back() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: 1\n\ndata: ") == [b"data: 1\n\n"]
    assert splitter.rest == b"data: "


def test_data_of_several_lines_is_joined() -> None:
    assert data_of(b": note\nevent: x\ndata: 1\ndata:2\n\n") == b"1\n2"


@pytest.mark.parametrize(
    ("event", "done"),
    [
        (b"data: [DONE]\n\n", True),
        (b"data:[DONE]\r\n\r\n", True),
        (b'data: {"content":"[DONE]"}\n\n', False),
        (b": [DONE]\n\n", False),
    ],
)
def test_only_the_closing_event_is_done(event: bytes, done: bool) -> None:
    assert is_done(event) is done


@given(TEXT, st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from([None, (",", ":")]))
def test_usage_is_found_whatever_the_model_wrote(
    text: str, prompt: int, completion: int, separators: tuple[str, str] | None
) -> None:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "details": {"cached": 1}}
    answer = {"text": '"usage": {"prompt_tokens": 9}' + text, "usage": usage, "after": text}
    assert find_usage(json.dumps(answer, separators=separators).encode()) == Usage(prompt, completion)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"usage":null}', b'{"usage":{}}', b'{"usage":{"prompt_tokens":"x"}}'])
def test_no_usage_is_found_where_there_is_none(body: bytes) -> None:
    assert find_usage(body) is None


@pytest.mark.parametrize(
    ("chunk", "only"),
    [
        ({"choices": [], "usage": {"prompt_tokens": 1}}, True),
        ({"choices": [], "usage": None}, False),
        ({"choices": [{"delta": {}}], "usage": {"prompt_tokens": 1}}, False),
        ({"choices": [{"delta": {"content": "usage"}}]}, False),
    ],
)
def test_the_chunk_with_token_counts_only_is_known_by_its_empty_choices(chunk: object, only: bool) -> None:
    assert is_usage_only(b"data: " + json.dumps(chunk).encode() + b"\n\n") is only


def test_an_error_is_found_at_the_top_of_an_event_only() -> None:
    assert find_error(b'data: {"error":{"message":"no"}}\n\n') == {"message": "no"}
    assert find_error(b'data: {"choices":[{"error":"error"}]}\n\n') is None
    assert find_error(b'data: "error"\n\n') is None


@pytest.mark.parametrize(
    ("event", "token"),
    [
        (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', True),
        (b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n', False),
        (b": keep-alive\n\n", False),
    ],
)
def test_a_token_is_neither_a_comment_nor_the_opening_of_a_message(event: bytes, token: bool) -> None:
    assert is_token(event) is token
