"""Tests that a judge compares two answers in both orders, over a real socket, and prints its address."""

from collections.abc import Sequence

import pytest

from svc.dataset.schema.example import ChatExample
from svc.errors import JudgeError, SettingsError
from svc.evaluation import endpoint as endpoint_module
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, Preference, judge_answers
from tests.svc.chats import chat
from tests.svc.evaluation.judge_server import JudgeServer, judge_server

PAIRS = [(chat(f"question {place}", f"reference {place}"), "poor", f"good {place}") for place in range(6)]


async def judge(pairs: Sequence[tuple[ChatExample, str, str]], at: Endpoint) -> JudgeReport:
    examples, first, second = zip(*pairs, strict=True)
    return await judge_answers(at, examples, first, second, title="judging")


def prefer_good(first: str, second: str) -> str:
    return "A" if first.startswith("good") else "B"


def endpoint(server: JudgeServer, key: str | None = None) -> Endpoint:
    return Endpoint(server.url, "wise", key)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_MAX_PAUSE_S", 0.01)


@pytest.mark.slow
async def test_judge_with_the_same_verdict_in_both_answer_orders_has_full_agreement() -> None:
    with judge_server(prefer_good) as server:
        report = await judge(PAIRS, endpoint(server))
    assert (report.pairs, report.unread) == (6, 0)
    assert (report.win_rate.value, report.agreement.value) == (1.0, 1.0)
    assert report.verdicts == ((Preference.SECOND, Preference.SECOND),) * 6
    assert len(server.requests) == 12


@pytest.mark.slow
async def test_judge_that_always_prefers_the_first_answer_yields_a_50_percent_win_rate_and_zero_agreement() -> None:
    with judge_server(lambda first, second: "A") as server:
        report = await judge(PAIRS, endpoint(server))
    assert (report.win_rate.value, report.agreement.value) == (0.5, 0.0)


async def test_win_rate_counts_a_tie_as_half_a_win() -> None:
    with judge_server(lambda first, second: "TIE") as server:
        report = await judge(PAIRS, endpoint(server))
    assert (report.win_rate.value, report.agreement.value) == (0.5, 1.0)


@pytest.mark.slow
async def test_win_rate_and_agreement_have_intervals() -> None:
    pairs = [*PAIRS, *((example, second, first) for example, first, second in PAIRS[:2])]
    with judge_server(prefer_good) as server:
        report = await judge(pairs, endpoint(server))
    assert report.win_rate.low < report.win_rate.value == 0.75 < report.win_rate.high
    assert report.agreement.low < 1.0


async def test_identical_answers_tie_without_a_request_to_the_judge() -> None:
    with judge_server(prefer_good) as server:
        report = await judge([(chat(), "same", " same\n"), PAIRS[0]], endpoint(server))
    assert report.verdicts[0] == (Preference.TIE, Preference.TIE)
    assert len(server.requests) == 2


async def test_judge_sees_both_answers_along_with_the_question_and_the_reference() -> None:
    with judge_server(prefer_good) as server:
        await judge(PAIRS[:1], endpoint(server, "secret"))
    question = server.requests[0]["messages"][-1]["content"]
    assert all(text in question for text in ("question 0", "reference 0", "poor", "good 0"))
    assert server.requests[0]["model"] == "wise"
    assert server.keys == ["Bearer secret"] * 2


async def test_no_api_key_is_sent_to_the_judge_when_none_is_configured() -> None:
    with judge_server(prefer_good) as server:
        await judge(PAIRS[:1], endpoint(server))
    assert server.keys == [None, None]


async def test_judge_url_is_printed_before_any_data_is_sent_to_the_judge(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with judge_server(prefer_good, failures=[(401, {}, "wrong key")] * 9) as server, pytest.raises(JudgeError):
        await judge(PAIRS, endpoint(server))
    assert (
        f"sending 6 prompts, each with its reference and both answers, to the judge wise at {server.url}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text",
    ["A", " a.", "**A**", "a", "The second is longer, so B at first sight. On reflection:\n\nA", "Verdict: A"],
)
async def test_judge_verdict_is_parsed_from_any_common_format(text: str) -> None:
    with judge_server(lambda first, second: text) as server:
        report = await judge(PAIRS[:1], endpoint(server))
    assert report.verdicts[0][0] is Preference.FIRST


@pytest.mark.parametrize("text", ["", "B is a better answer", "Both are good.", "C", "neither", "Answer: Apple"])
async def test_text_without_a_judge_verdict_yields_no_verdict(text: str) -> None:
    with judge_server(lambda first, second: text) as server, pytest.raises(JudgeError, match="returned no verdict"):
        await judge(PAIRS[:1], endpoint(server))


@pytest.mark.slow
async def test_pairs_without_a_judge_verdict_are_excluded_if_they_are_few() -> None:
    pairs = [(chat(str(place), "r"), "poor" if place else "odd", f"good {place}") for place in range(12)]
    with judge_server(
        lambda first, second: "both!" if "odd" in (first, second) else prefer_good(first, second)
    ) as server:
        report = await judge(pairs, endpoint(server))
    assert (report.pairs, report.unread, report.verdicts[0]) == (11, 1, ())


@pytest.mark.slow
async def test_judge_returning_no_verdicts_raises_error() -> None:
    with (
        judge_server(lambda first, second: "both are fine") as server,
        pytest.raises(JudgeError, match="no verdict for 6 of 6 pairs"),
    ):
        await judge(PAIRS, endpoint(server))


@pytest.mark.parametrize("failure", [(429, {"retry-after": "0"}, "slow"), (503, {}, "busy"), (500, {}, "oh")])
async def test_transient_judge_failure_is_retried(failure: tuple[int, dict[str, str], str]) -> None:
    with judge_server(prefer_good, failures=[failure] * 2) as server:
        report = await judge(PAIRS[:1], endpoint(server))
    assert report.win_rate.value == 1.0
    assert len(server.requests) == 4


async def test_judge_retries_are_limited() -> None:
    with (
        judge_server(prefer_good, failures=[(429, {}, "out of quota")] * 100) as server,
        pytest.raises(JudgeError, match="429: out of quota"),
    ):
        await judge(PAIRS[:1], endpoint(server))
    assert len(server.requests) == 5


async def test_rejected_judge_request_fails_immediately_with_advice() -> None:
    with (
        judge_server(prefer_good, failures=[(401, {}, "no such key")] * 100) as server,
        pytest.raises(JudgeError, match="401: no such key") as caught,
    ):
        await judge(PAIRS[:1], endpoint(server, "secret"))
    assert len(server.requests) == 1
    assert "judge.key_file" in caught.value.todo
    assert "secret" not in str(caught.value)


async def test_temperature_is_omitted_when_the_judge_model_rejects_it() -> None:
    with judge_server(prefer_good, failures=[(400, {}, "'temperature' does not support 0")]) as server:
        report = await judge(PAIRS[:1], endpoint(server))
    assert report.pairs == 1
    assert ["temperature" in body for body in server.requests] == [True, False, False]


async def test_response_that_is_not_a_chat_completion_raises_error() -> None:
    with judge_server(prefer_good, body=b"<html>") as server, pytest.raises(JudgeError, match="<html>"):
        await judge(PAIRS[:1], endpoint(server))


async def test_unreachable_judge_endpoint_raises_error() -> None:
    with judge_server(prefer_good) as server:
        pass
    with pytest.raises(JudgeError, match="ConnectError"):
        await judge(PAIRS[:1], endpoint(server))


@pytest.mark.parametrize("url", ["api.openai.com", "ftp://host/v1", "https://user:pass@host/v1", "https://"])
async def test_invalid_judge_endpoint_is_rejected(url: str) -> None:
    with pytest.raises(SettingsError, match="is not valid"):
        await judge(PAIRS, Endpoint(url, "wise"))


async def test_api_key_is_not_sent_over_an_unencrypted_network_connection() -> None:
    with pytest.raises(SettingsError, match="unencrypted"):
        await judge(PAIRS, Endpoint("http://example.org/v1", "wise", "secret"))
