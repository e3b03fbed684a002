"""Tests that the evaluator asks every example through the endpoint and reports on these answers."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import EngineClient
from svc.errors import EngineError, RecipeError
from svc.evaluation.evaluator import Evaluation, ask_example, evaluate, score, score_answers
from svc.evaluation.intervals import proportion
from svc.evaluation.metrics.metric import Answered
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.results import ExampleResult
from tests.serving.engine_double import EngineDouble, logprob_of, tokenized
from tests.svc.chats import chat
from tests.svc.engine.in_process import client_of
from tests.svc.evaluation.answered import answered
from trainer.evaluation.answer_limit import answer_limits

ONE = "1.0 1.1 1.2 1.3"  # what the double answers with the weights of version 1


async def judged(client: EngineClient, examples: Sequence[ChatExample], *, limit: int, **options: Any) -> Evaluation:
    limits = [limit] * len(examples)
    return await evaluate(client, examples, [tokenized(example) for example in examples], limits=limits, **options)


async def asked(client: EngineClient, example: ChatExample, **options: Any) -> ExampleResult:
    return await ask_example(client, example, tokenized(example), **options)


async def test_answers_are_compared_with_their_references() -> None:
    examples = [chat("a", ONE), chat("b", "other"), chat("c", ONE), chat("d", "other")]
    async with client_of(EngineDouble()) as client:
        report = (await judged(client, examples, limit=8)).report
    assert report.hits == (True, False, True, False)
    assert report.exact_match.value == 0.5
    assert report.exact_match.low < 0.5 < report.exact_match.high
    assert report.examples == 4


async def test_documents_are_scored_without_generating_answers() -> None:
    documents = [ChatExample.of_document(text) for text in ("a b c", "d e")]
    rows = [TokenizedExample(tuple(range(1, length)), ((1, length - 1),)) for length in (5, 4)]
    async with client_of(EngineDouble()) as client:
        evaluation = await evaluate(client, documents, rows, limits=[8, 8])
        expected = [-await score(client, row) for row in rows]
    assert [result.nll for result in evaluation.results] == expected
    assert {result.answer for result in evaluation.results} == {""}
    assert list(evaluation.report.metrics) == ["perplexity"]
    assert evaluation.report.primary == "perplexity"


async def test_evaluation_results_follow_the_order_of_the_examples() -> None:
    examples = [chat("a", ONE), chat("b c", "other")]
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        evaluation = await judged(client, examples, limit=8)
        alone = [await asked(client, example, limit=8) for example in examples]
    assert [result.model_copy(update={"scores": {}}) for result in evaluation.results] == alone
    assert [result.hit for result in alone] == list(evaluation.report.hits) == [True, False]
    assert [(result.answer.strip(), result.tokens, result.finish_reason) for result in alone] == [(ONE, 5, "stop")] * 2


async def test_answer_logprob_matches_rescoring_and_excludes_the_end_token() -> None:
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        result = await asked(client, chat("a", "other"), limit=8)
        whole = tokenized(chat("a", result.answer))
        ends = len(whole.input_ids) - 1
        bare = replace(whole, input_ids=whole.input_ids[:-1], learnt=((whole.learnt[0][0], ends),))
        scored = await score(client, bare)
    assert result.logprob == pytest.approx(scored)


async def test_answer_equal_to_the_reference_is_not_scored_again() -> None:
    double = EngineDouble(finish_reason="stop")
    async with client_of(double) as client:
        answered = await asked(client, chat("a", "other"), limit=8)
        scored = double.calls.count("/v1/completions")
        again = await asked(client, chat("a", answered.answer), limit=8)
    assert double.calls.count("/v1/completions") == scored == 1
    assert again.hit
    expected = [logprob_of(double.weights, token, 1 + at) for at, token in enumerate(tokenized(chat("a", ONE)).answer)]
    assert -again.nll == pytest.approx(fmean(expected))
    assert again.logprob == answered.logprob == pytest.approx(fmean(expected[:-1]))


@pytest.mark.parametrize("reference", ["other", ONE])
async def test_evaluation_results_do_not_depend_on_whether_the_model_is_marked_as_trained(reference: str) -> None:
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        answers = [await asked(client, chat("a", reference), limit=8, trained=way) for way in (True, False)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("cut", ["1.0 1.1", "1.0 1.1 1.2 1.3 1.4"])
async def test_reference_is_scored_whether_it_is_longer_or_shorter_than_the_answer(cut: str) -> None:
    double = EngineDouble(finish_reason="stop")
    async with client_of(double) as client:
        result = await asked(client, chat("a", cut), limit=8)
    assert double.calls.count("/v1/completions") == 1
    assert not result.hit


async def test_truncated_answer_matching_the_reference_is_still_scored() -> None:
    double = EngineDouble(finish_reason="length")
    async with client_of(double) as client:
        await asked(client, chat("a", ONE), limit=8)
    assert double.calls.count("/v1/completions") == 1


@pytest.mark.slow
async def test_long_answer_identical_to_the_reference_counts_as_correct_with_the_default_token_limit() -> None:
    double = EngineDouble(tokens=200, finish_reason="stop")
    example = chat("a", " ".join(f"1.{number}" for number in range(200)))
    seen = [tokenized(example)]
    async with client_of(double) as client:
        limits = answer_limits(seen, context=2048, fixed=None)
        report = (await evaluate(client, [example], seen, limits=limits)).report
        short = (await evaluate(client, [example], seen, limits=answer_limits(seen, context=2048, fixed=64))).report
    assert (report.hits, report.cut_off.value) == ((True,), 0)
    assert (short.hits, short.cut_off.value) == ((False,), 1)


async def test_answers_reaching_their_own_token_limit_are_counted_as_truncated() -> None:
    examples = [chat("a", ONE), chat("b", ONE), chat("c", ONE), chat("d", ONE)]
    async with client_of(EngineDouble(finish_reason="stop")) as client:
        seen = [tokenized(example) for example in examples]
        evaluation = await evaluate(client, examples, seen, limits=(8, 8, 2, 8))
    assert [result.limit for result in evaluation.results] == [8, 8, 2, 8]
    assert [result.cut_off for result in evaluation.results] == [False, False, True, False]
    assert evaluation.report.cut_off == proportion(1, 4)


async def test_answers_respect_the_token_limit() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await judged(client, [chat("a", ONE)], limit=2)).report
    assert report.hits == (False,)


async def test_model_receives_all_turns_except_the_answer() -> None:
    double = EngineDouble()
    turns = (Message(Role.SYSTEM, "be short"), Message(Role.USER, "which"), Message(Role.ASSISTANT, "secret"))
    async with client_of(double) as client:
        await judged(client, [ChatExample(turns)], limit=2)
    asked = [body["messages"] for body in double.requests if "messages" in body]
    assert asked == [[{"role": "system", "content": "be short"}, {"role": "user", "content": "which"}]]


async def test_reference_is_scored_including_its_end_token() -> None:
    double, example = EngineDouble(), chat("one two", "three four")
    async with client_of(double) as client:
        result = await asked(client, example, limit=2)
    expected = [logprob_of(double.weights, token, 2 + at) for at, token in enumerate(tokenized(example).answer)]
    assert result.nll == pytest.approx(-fmean(expected))
    assert result.scored == 3


async def test_reported_nll_is_averaged_per_token() -> None:
    examples = [chat("a", "one"), chat("b", "one two three four")]
    async with client_of(EngineDouble()) as client:
        evaluation = await judged(client, examples, limit=2)
    short, long = evaluation.results
    assert evaluation.report.nll.value == pytest.approx((2 * short.nll + 5 * long.nll) / 7)


async def test_conversation_answers_that_are_not_trained_on_are_not_scored() -> None:
    double, example = EngineDouble(), chat("a b", "c d e")
    of_two = replace(tokenized(example), learnt=((1, 2), (4, 6)))
    async with client_of(double) as client:
        result = await ask_example(client, example, of_two, limit=2)
    expected = [logprob_of(double.weights, of_two.input_ids[at], at) for at in (1, 4, 5)]
    assert result.nll == pytest.approx(-fmean(expected))
    assert result.scored == 3


async def test_valid_json_is_measured_when_all_references_are_json() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await judged(client, [chat("a", "{}"), chat("b", '{"x": 1}')], limit=2)).report
    assert report.valid_json is not None
    assert report.valid_json.value == 0.0


async def test_valid_json_is_not_measured_when_a_reference_is_plain_text() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await judged(client, [chat("a", "{}"), chat("b", "text")], limit=2)).report
    assert report.valid_json is None


async def test_progress_advances_with_each_evaluated_example() -> None:
    done: list[None] = []
    async with client_of(EngineDouble()) as client:
        await judged(client, [chat(str(number)) for number in range(5)], limit=1, on_done=lambda: done.append(None))
    assert len(done) == 5


@pytest.mark.slow
async def test_at_most_16_examples_are_evaluated_concurrently() -> None:
    double = EngineDouble(token_delay_s=0.01)
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, double.running)

    async with client_of(double) as client:
        await judged(client, [chat(str(number)) for number in range(40)], limit=1, on_done=watch)
    assert 2 <= most <= 16


async def test_one_failed_request_fails_the_evaluation() -> None:
    examples = [chat("a"), chat(" ".join("long" for _ in range(30)))]
    async with client_of(EngineDouble(max_model_len=20)) as client:
        with pytest.raises(EngineError, match="maximum context length"):
            await judged(client, examples, limit=1)


@pytest.mark.parametrize("noise", [math.nan, -math.inf])
async def test_evaluation_fails_when_scoring_yields_nan(noise: float) -> None:
    async with client_of(EngineDouble(probe_noise=noise)) as client:
        with pytest.raises(EngineError, match="non-finite log-probability"):
            await judged(client, [chat("a")], limit=1)


async def test_evaluation_fails_when_an_answer_logprob_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    async def logprobs(self: EngineClient, token_ids: object, start: int) -> tuple[float, ...]:
        return (-1.0,)

    monkeypatch.setattr(EngineClient, "logprobs", logprobs)
    async with client_of(EngineDouble(probe_noise=math.nan)) as client:
        with pytest.raises(EngineError, match="non-finite log-probability"):
            await judged(client, [chat("a")], limit=1)


async def test_evaluation_report_round_trips_through_json() -> None:
    async with client_of(EngineDouble()) as client:
        report = (await judged(client, [chat("a", ONE)], limit=4)).report
    assert type(report).model_validate_json(report.model_dump_json()) == report


async def test_evaluation_report_lists_the_primary_metric_first() -> None:
    async with client_of(EngineDouble()) as client:
        examples = [chat("a", ONE), chat("b", ONE), chat("c", "other"), chat("d", "other")]
        evaluation = await judged(client, examples, limit=8)
    report = evaluation.report
    assert (report.primary, next(iter(report.figures))) == ("accuracy", "accuracy")
    assert report.figures["accuracy"].estimate == report.exact_match
    assert [result.scores["accuracy"] for result in evaluation.results] == [1.0, 1.0, 0.0, 0.0]


def test_metric_scores_are_recomputed_from_the_answers() -> None:
    given = answered([("a", "a"), ("b", "c")])
    wrong = [result.model_copy(update={"scores": {"exact_match": 0.5}}) for result in given.results]
    evaluation = score_answers(given.examples, wrong, 0.0, [ExactMatch()])
    assert [result.scores for result in evaluation.results] == [{"exact_match": 1.0}, {"exact_match": 0.0}]


@pytest.mark.parametrize(
    ("scores", "wrong"),
    [
        ([1.0], "1 scores for 2 answers"),
        ([1.0, 1.0, 1.0], "3 scores for 2 answers"),
        ([1.0, math.nan], "the score of answer 2 is nan"),
        ([math.inf, 1.0], "the score of answer 1 is inf"),
    ],
)
def test_metric_must_return_one_finite_score_per_answer(scores: list[float], wrong: str) -> None:
    class Own(ExactMatch):
        name = "own"

        def score(self, answered: Answered) -> list[float]:
            return scores

    given = answered([("a", "a"), ("b", "c")])
    with pytest.raises(RecipeError, match=f"metric own returned invalid scores: {wrong}"):
        score_answers(given.examples, given.results, 0.0, [Own()])


def parts(given: Answered) -> tuple[Sequence[ChatExample], Sequence[ExampleResult], float]:
    return given.examples, given.results, 0.0
