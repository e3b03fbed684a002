"""The evaluator asks every example through the endpoint, and its report is the one of those answers."""

import math
from statistics import fmean

import pytest

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.vllm.client import EngineClient
from svc.errors import EngineError
from svc.evaluation.evaluator import ask_example, evaluate, tokenize
from tests.serving.engine_double import EngineDouble, logprob_of
from tests.svc.chats import chat
from tests.svc.engine.in_process import client_of

ONE = "1.0 1.1 1.2 1.3"  # what the double answers with the weights of version 1


async def test_answers_are_compared_with_their_references() -> None:
    examples = [chat("a", ONE), chat("b", "other"), chat("c", ONE), chat("d", "other")]
    async with client_of(EngineDouble()) as client:
        report = (await evaluate(client, examples, max_tokens=8)).report
    assert report.hits == (True, False, True, False)
    assert report.exact_match.value == 0.5
    assert report.exact_match.low < 0.5 < report.exact_match.high
    assert report.examples == 4


async def test_every_example_has_its_result_in_their_order() -> None:
    examples = [chat("a", ONE), chat("b c", "other")]
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        evaluation = await evaluate(client, examples, max_tokens=8)
        alone = [await ask_example(client, example, max_tokens=8) for example in examples]
    assert list(evaluation.results) == alone
    assert [result.hit for result in alone] == list(evaluation.report.hits) == [True, False]
    assert [(result.answer.strip(), result.tokens, result.finish_reason) for result in alone] == [(ONE, 5, "stop")] * 2
    assert fmean(result.nll for result in alone) == pytest.approx(evaluation.report.nll.value)


async def test_an_answer_is_as_likely_as_its_text_scored_as_a_reference() -> None:
    async with client_of(EngineDouble()) as client:
        result = await ask_example(client, chat("a", "other"), max_tokens=8)
        scored = await ask_example(client, chat("a", result.answer), max_tokens=8)
    assert result.logprob == pytest.approx(-scored.nll)


async def test_an_answer_that_is_the_reference_is_not_scored_again() -> None:
    double = EngineDouble(finish_reason="stop")
    async with client_of(double) as client:
        answered = await ask_example(client, chat("a", "other"), max_tokens=8)
        scored = double.calls.count("/v1/completions")
        again = await ask_example(client, chat("a", answered.answer), max_tokens=8)
    assert double.calls.count("/v1/completions") == scored == 1
    assert again.hit
    assert -again.nll == again.logprob == answered.logprob


@pytest.mark.parametrize("reference", ["other", ONE])
async def test_whether_a_model_was_trained_changes_no_result(reference: str) -> None:
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        answers = [await ask_example(client, chat("a", reference), max_tokens=8, trained=way) for way in (True, False)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("cut", ["1.0 1.1", "1.0 1.1 1.2 1.3 1.4"])
async def test_a_reference_that_is_longer_or_shorter_is_scored(cut: str) -> None:
    double = EngineDouble(finish_reason="stop")
    async with client_of(double) as client:
        result = await ask_example(client, chat("a", cut), max_tokens=8)
    assert double.calls.count("/v1/completions") == 1
    assert not result.hit


async def test_an_answer_that_was_cut_off_is_scored() -> None:
    double = EngineDouble(finish_reason="length")
    async with client_of(double) as client:
        await ask_example(client, chat("a", ONE), max_tokens=8)
    assert double.calls.count("/v1/completions") == 1


async def test_the_longest_answer_is_respected() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await evaluate(client, [chat("a", ONE)], max_tokens=2)).report
    assert report.hits == (False,)


async def test_the_model_sees_all_turns_but_the_answer() -> None:
    double = EngineDouble()
    turns = (Message(Role.SYSTEM, "be short"), Message(Role.USER, "which"), Message(Role.ASSISTANT, "secret"))
    async with client_of(double) as client:
        await evaluate(client, [ChatExample(turns)], max_tokens=2)
    asked = [body["messages"] for body in double.requests if "messages" in body]
    assert asked == [[{"role": "system", "content": "be short"}, {"role": "user", "content": "which"}]]


async def test_the_reference_is_scored_a_token() -> None:
    double = EngineDouble()
    async with client_of(double) as client:
        example = chat("one two", "three four")
        tokenized = await tokenize(client, example)
        report = (await evaluate(client, [example], max_tokens=2)).report
    expected = [logprob_of(double.weights, token, 2 + index) for index, token in enumerate(tokenized.answer)]
    assert report.nll.value == pytest.approx(-sum(expected) / 2)


async def test_json_is_counted_where_all_references_are_json() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await evaluate(client, [chat("a", "{}"), chat("b", '{"x": 1}')], max_tokens=2)).report
    assert report.valid_json is not None
    assert report.valid_json.value == 0.0


async def test_json_is_not_counted_where_a_reference_is_text() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await evaluate(client, [chat("a", "{}"), chat("b", "text")], max_tokens=2)).report
    assert report.valid_json is None


async def test_every_example_advances_the_progress() -> None:
    done: list[None] = []
    async with client_of(EngineDouble()) as client:
        await evaluate(
            client, [chat(str(number)) for number in range(5)], max_tokens=1, on_done=lambda: done.append(None)
        )
    assert len(done) == 5


async def test_no_more_than_sixteen_examples_are_asked_at_once() -> None:
    double = EngineDouble(token_delay_s=0.01)
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, double.running)

    async with client_of(double) as client:
        await evaluate(client, [chat(str(number)) for number in range(40)], max_tokens=1, on_done=watch)
    assert 2 <= most <= 16


async def test_one_failed_request_is_no_report() -> None:
    examples = [chat("a"), chat(" ".join("long" for _ in range(30)))]
    async with client_of(EngineDouble(max_model_len=20)) as client:
        with pytest.raises(EngineError, match="maximum context length"):
            await evaluate(client, examples, max_tokens=1)


@pytest.mark.parametrize("noise", [math.nan, -math.inf])
async def test_weights_that_give_no_number_are_no_report(noise: float) -> None:
    async with client_of(EngineDouble(probe_noise=noise)) as client:
        with pytest.raises(EngineError, match="no finite number"):
            await evaluate(client, [chat("a")], max_tokens=1)


async def test_an_answer_without_a_number_is_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    async def logprobs(self: EngineClient, token_ids: object, start: int) -> tuple[float, ...]:
        return (-1.0,)

    monkeypatch.setattr(EngineClient, "logprobs", logprobs)
    async with client_of(EngineDouble(probe_noise=math.nan)) as client:
        with pytest.raises(EngineError, match="no finite number"):
            await evaluate(client, [chat("a")], max_tokens=1)


async def test_a_report_survives_its_journey_to_disk() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await evaluate(client, [chat("a", ONE)], max_tokens=4)).report
    assert type(report).model_validate_json(report.model_dump_json()) == report
