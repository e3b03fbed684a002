"""A request's place in its trace, as the W3C's Trace Context has it."""

import logging
import string
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.telemetry.traces.tracer import Tracer
from svc.key_secret import new_secret

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACER = Tracer(1.0)
Headers = list[tuple[bytes, bytes]]


def headers(*parents: str, state: str | None = None) -> Headers:
    given = [(b"host", b"localhost"), *((b"traceparent", parent.encode("latin-1")) for parent in parents)]
    return given if state is None else [*given, (b"tracestate", state.encode("latin-1"))]


def taken_over(*parents: str) -> bool:
    return TRACER.begin(headers(*parents)).parent_id is not None


@pytest.mark.parametrize(
    "parent",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-03",
        f"01-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-will-be",
    ],
)
def test_a_parent_is_taken_over(parent: str) -> None:
    place = TRACER.begin(headers(parent))
    assert (f"{place.trace_id:032x}", f"{place.parent_id:016x}") == (TRACE, PARENT)
    assert place.sampled is (not parent.endswith("-00"))


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01" + "-x" * 100_000,
    ],
)
def test_a_malformed_parent_is_none(parent: str) -> None:
    assert not taken_over(parent)


def test_of_two_parents_none_holds() -> None:
    assert not taken_over(f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01")


@given(st.text(st.characters(max_codepoint=255)), st.text(st.characters(max_codepoint=255)))
def test_whatever_a_client_sends_the_engine_gets_whole_header_lines(parent: str, state: str) -> None:
    for one in (parent, f"00-{TRACE}-{PARENT}-01"):
        lines = TRACER.begin(headers(one, state=state)).header_lines
        assert lines.endswith("\r\n")
        for line in lines.removesuffix("\r\n").split("\r\n"):
            assert line.split(": ")[0] in ("traceparent", "tracestate")
            assert {*line} <= {*string.printable} - {*"\r\n\x0b\x0c"}


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("a=1", "a=1"),
        ("a=1, b@c=2", "a=1,b@c=2"),
        (None, ""),
        ("a", ""),
        (",".join(f"k{number}=1" for number in range(33)), ""),
        ("a=" + "x" * 100_000, ""),
    ],
)
def test_a_state_goes_with_its_parent_where_it_is_valid(given: str | None, passed: str) -> None:
    assert TRACER.begin(headers(f"00-{TRACE}-{PARENT}-01", state=given)).state == passed


def test_a_state_without_a_parent_says_nothing() -> None:
    assert TRACER.begin(headers(state="a=1")).state == ""


def test_a_state_with_a_secret_goes_nowhere() -> None:
    assert (
        TRACER.begin(headers(f"00-{TRACE}-{PARENT}-01", state=f"a={new_secret('abcdefgh')}")).header_lines.count("\r\n")
        == 1
    )


def test_what_clients_send_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for parent in ("x" * 100_000, f"00-{TRACE}-{PARENT}-01"):
        TRACER.begin(headers(parent, state="b" * 100_000))
        TRACER.begin(headers(parent, state="b=1,b=2,c"))
    assert caplog.records == []


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 400, 600), (1.0, 2000, 2000)])
def test_a_share_of_the_traces_that_begin_here_is_sampled(share: float, least: int, most: int) -> None:
    tracer = Tracer(share)
    assert least <= sum(tracer.begin(headers()).sampled for _ in range(2000)) <= most


@pytest.mark.parametrize(("flags", "sampled"), [("00", False), ("01", True)])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_client_decides_for_its_own(share: float, flags: str, sampled: bool) -> None:
    assert Tracer(share).begin(headers(f"00-{TRACE}-{PARENT}-{flags}")).sampled is sampled


def test_no_id_comes_twice() -> None:
    places = [TRACER.begin(headers()) for _ in range(1000)]
    assert len({place.trace_id for place in places}) == len({place.span_id for place in places}) == 1000


def test_a_span_has_its_length_when_the_clock_is_set_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Mapping[str, int] = {"time.time_ns": 10**18}
    for name, value in times.items():
        monkeypatch.setattr(name, lambda value=value: value)
    place = TRACER.begin(headers())
    monkeypatch.setattr("time.time_ns", lambda: 0)
    place.end(model=None, stream=None, queue_s=0.0, overhead_s=None)
    assert 0 <= place.ended_ns - place.started_ns < 10**9
