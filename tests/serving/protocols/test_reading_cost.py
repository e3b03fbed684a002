"""Tests that no accepted body blocks the event loop for long, and that ordinary bodies are accepted."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.protocols.reading_cost import takes_longer
from serving.protocols.request import InvalidJsonError, InvalidRequestError, parse_request
from serving.protocols.route import Route
from svc.settings.serve import RequestLimits, ServeSettings
from tests.event_loop import max_cpu_s
from tests.serving.protocols.worst_bodies import worst_bodies

MAX_MS = RequestLimits().reading_ms
MAX_BYTES = ServeSettings().max_body_bytes
ELEMENTS = (
    *(b"{}", b"[]", b"[[]]", b"1", b"1.5", b"1e300", b"null", b'""', b'"a"', b'{"a":1}', b"[" * 60 + b"]" * 60),
    *(b'{"role":"user","content":"a"}', b'{"role":"user","content":[{"type":"text","text":"a"}]}'),
    b'{"type":"text","text":"a"}',
)
TEXTS = (b"a", b"\\n", b'\\"', b"\\\\", b"\\u00e9", b"\\ud800", "é".encode(), b",", b"[{:,", b"1", b" ")
HEADS = (
    (Route.CHAT_COMPLETIONS, b'"messages":['),
    (Route.CHAT_COMPLETIONS, b'"messages":[{"role":"user","content":['),
    (Route.CHAT_COMPLETIONS, b'"tool_choice":"required","tools":[{"strict":true,"x":['),
    (Route.CHAT_COMPLETIONS, b'"response_format":{"x":['),
    (Route.CHAT_COMPLETIONS, b'"unknown":['),
    (Route.COMPLETIONS, b'"prompt":['),
    (Route.RESPONSES, b'"input":['),
    (Route.RESPONSES, b'"tools":['),
    (Route.MESSAGES, b'"messages":[{"role":"user","content":['),
)
SLOWEST_HEAD, SLOWEST_ELEMENTS = b'"response_format":{"x":[', (b"1e300", b"[" * 60 + b"]" * 60)
"""Body start for which most elements take longest, and the elements that take longest for most starts."""
VALID = (
    (b'"messages":[', b'{"role":"user","content":"a"}'),
    (b'"messages":[{"role":"user","content":[', b'{"type":"text","text":"a"}'),
    (b'"tool_choice":"required","tools":[{"strict":true,"x":[', b'"a"'),
    (b'"prompt":[', b"1"),
    (b'"input":[', b'{"role":"user","content":"a"}'),
)
LISTS = [
    *((Route.CHAT_COMPLETIONS, SLOWEST_HEAD, element) for element in ELEMENTS),
    *(
        (*head, element)
        for head, element in zip(HEADS, cycle(SLOWEST_ELEMENTS), strict=False)
        if head[1] != SLOWEST_HEAD
    ),
    *((route, head, element) for route, head in HEADS for element in ELEMENTS if (head, element) in VALID),
]
"""Each element under the slowest head, each head with a slow element, and lists that are valid."""
PAIRS_OF_TEXTS = [
    *((text, "é".encode()) for text in TEXTS),
    *((text, text) for text in (b"a", b"\\n", b",", b"\\\\")),
]


def closed(head: bytes) -> bytes:
    """Return the end that completes a body with this beginning."""
    closing = {ord("["): b"]", ord("{"): b"}"}
    return b"".join(closing[byte] for byte in reversed(head) if byte in closing and head.count(byte) > 0)[: _open(head)]


def _open(head: bytes) -> int:
    return head.count(b"[") + head.count(b"{") - head.count(b"]") - head.count(b"}")


def largest(make: Callable[[int], bytes], most: int) -> bytes:
    """Return the largest body of its kind that is accepted."""
    fewest = 1
    while most - fewest > most // 50:
        middle = (fewest + most + 1) // 2
        fewest, most = (fewest, middle - 1) if takes_longer(make(middle), MAX_MS) else (middle, most)
    return make(fewest)


def share_of_limit(body: bytes, route: Route) -> float:
    """Return the CPU time of reading a body, whether it is accepted or not, as a share of `max_cpu_s`.

    The time is that of the first reading within the limit, or of the last of up to 20 readings.
    """
    for _ in range(20):
        began = time.thread_time()
        with suppress(InvalidJsonError, InvalidRequestError):
            parse_request(body, route)
        if (share := (time.thread_time() - began) / max_cpu_s()) < 1:
            break
    return share


@pytest.mark.slow
@pytest.mark.parametrize(("route", "head", "element"), LISTS, ids=lambda part: str(part)[:40])
def test_parsing_lists_within_the_limits_blocks_the_event_loop_only_briefly(
    route: Route, head: bytes, element: bytes
) -> None:
    begin = b'{"model":"tuned",' + head

    def make(count: int) -> bytes:
        return begin + b",".join([element] * count) + closed(begin)

    most = MAX_BYTES // (len(element) + 1) - 100
    json.loads(make(2))
    for body in (largest(make, most), make(most)):
        assert share_of_limit(body, route) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("some", "other"), PAIRS_OF_TEXTS, ids=ascii)
def test_parsing_strings_within_the_limits_blocks_the_event_loop_only_briefly(some: bytes, other: bytes) -> None:
    def make(count: int) -> bytes:
        half = count // 2
        return b'{"model":"tuned","prompt":"' + some * (half // len(some)) + other * (half // len(other)) + b'"}'

    for body in (largest(make, MAX_BYTES - 100), make(MAX_BYTES - 100)):
        assert share_of_limit(body, Route.COMPLETIONS) < 1


@pytest.mark.slow
def test_worst_case_request_bodies_are_accepted_and_block_the_event_loop_only_briefly() -> None:
    faults = []
    for worst in worst_bodies():
        name, body = f"{worst.route.name} {worst.name}", worst.body("tuned")
        try:
            assert parse_request(body, worst.route).model == "tuned"
        except (InvalidJsonError, InvalidRequestError) as rejected:
            faults.append(f"{name}: {rejected}")
        if (share := share_of_limit(body, worst.route)) >= 1:
            faults.append(f"{name}: {share:.2f} of the limit")
    assert faults == []


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b"{}," * 1_000_000,
        b'["' + b'","' * 500_000 + b'"]',
        b'{"a":' + b"1" * 200_000 + b"}",
        b"[" + b",".join([b"1" * 4000] * 1000) + b"]",
        b'{"a":"' + b"\\n" * 2_000_000 + b'"}',
    ],
    ids=lambda body: body[:8].decode(),
)
def test_body_that_is_too_slow_to_parse_is_detected_without_parsing(body: bytes) -> None:
    began = time.thread_time()
    assert takes_longer(body, MAX_MS)
    assert time.thread_time() - began < max_cpu_s()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "word, [1]: {2}, " * 200_000}]},
        {"messages": [{"role": "user", "content": "1" * 1_000_000}]},
        {"messages": [{"role": "user", "content": json.dumps([{"a": n, "b": [n]} for n in range(20_000)])}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 100}]}] * 4096},
        {"prompt": list(range(131_072))},
        {"prompt": "\n".join(f'"{n}";"a \\ b"' for n in range(30_000))},
    ],
    ids=["separators", "digits", "JSON", "4,096 messages", "131,072 token ids", "CSV"],
)
def test_large_ordinary_bodies_are_accepted(fields: object) -> None:
    assert not takes_longer(json.dumps(fields, separators=(",", ":")).encode(), MAX_MS)


JSON_TEXTS = st.text(alphabet='a"\\,:[]{}1é', max_size=30)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | JSON_TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(JSON_TEXTS, inner, max_size=5),
    max_leaves=30,
)


def count(value: object) -> tuple[int, int]:
    """Return the number of separators, and of objects and arrays, in a compactly written JSON value."""
    if isinstance(value, dict):
        inner = [count(each) for each in value.values()]
        own = len(value) + max(0, len(value) - 1)
    elif isinstance(value, list):
        inner = [count(each) for each in value]
        own = max(0, len(value) - 1)
    else:
        return 0, 0
    containers = 1 + sum(each for _, each in inner)
    return own + sum(separators for separators, _ in inner), containers


@pytest.mark.slow
@given(value=JSON_VALUES, ensure_ascii=st.booleans(), size=st.integers(1, 40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_separators_inside_strings_do_not_add_to_the_estimated_parsing_time(
    monkeypatch: pytest.MonkeyPatch, value: object, ensure_ascii: bool, size: int
) -> None:
    monkeypatch.setattr("serving.protocols.reading_cost._SLICE", size)
    body = json.dumps(value, ensure_ascii=ensure_ascii, separators=(",", ":")).encode()
    separators, containers = count(value)
    escapes, quotes = body.count(b"\\"), body.count(b'"')
    exact_ns = (separators + 2 * containers) * 100 + containers * 900 + len(body) * 3 + escapes * 18 + quotes * 20
    assert not takes_longer(body, (exact_ns + 20 * (len(body) / size + 1)) / 1e6 + 1e-6)
