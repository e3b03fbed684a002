"""Evaluates models for the trainer, gates and monitoring, through the same endpoint that serves clients.

Greedy answers are compared with references. In addition, the log-likelihood of the references reveals differences that
are too small for exact match to detect. The log-likelihood covers the tokens of the final answer, including the token
that ends it, so the negative log-likelihood per token equals the training loss on that answer.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample, any_call_tools
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.client import Answer, EngineClient
from svc.errors import EngineError
from svc.evaluation.intervals import Interval, proportion
from svc.evaluation.metrics.choose import choose_metrics
from svc.evaluation.metrics.json_answers import is_json
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.metrics.text import comparable_text, matches
from svc.evaluation.metrics.tokens import CutOff, Nll
from svc.evaluation.results import ExampleResult

CONCURRENCY = 16
"""Maximum number of concurrent requests."""


class MetricReport(BaseModel):
    """A model's result on one metric.

    Attributes:
        title: name of the metric for display.
        estimate: the metric's value and its 95% confidence interval.
        better: whether higher or lower values are better.
        unit: unit of the values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    estimate: Interval
    better: Better
    unit: Unit

    @classmethod
    def of(cls, metric: Metric, estimate: Interval) -> "MetricReport":
        """Create the report for a metric from its estimate."""
        return cls(title=metric.title, estimate=estimate, better=metric.better, unit=metric.unit)


class EvaluationReport(BaseModel):
    """Report on the quality of a model's answers to a held-out set.

    Attributes:
        examples: number of evaluated examples.
        exact_match: share of answers that equal the reference.
        valid_json: share of answers that are valid JSON, or None if the references are not JSON.
        cut_off: share of answers that were cut off at their token limit.
        nll: mean negative log-likelihood of all tokens in the reference answers, in nats per token.
        hits: for each example, whether its answer is an exact match; used for paired comparisons.
        seconds: time taken to generate and score all answers, or 0 if they were cached.
        metrics: reports on the metrics, keyed by name.
        primary: name of the primary metric, which is used by the gates and tracked by monitoring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    exact_match: Interval
    valid_json: Interval | None
    cut_off: Interval
    nll: Interval
    hits: tuple[bool, ...]
    seconds: float
    metrics: dict[str, MetricReport]
    primary: str

    @property
    def figures(self) -> dict[str, MetricReport]:
        """The reports on all metrics, keyed by name, primary metric first."""
        return {self.primary: self.metrics[self.primary]} | self.metrics

    @property
    def all_figures(self) -> dict[str, MetricReport]:
        """The reports in `figures`, then the reports on the share of cut-off answers and on the log-likelihood."""
        last = {CutOff.name: MetricReport.of(CutOff(), self.cut_off), Nll.name: MetricReport.of(Nll(), self.nll)}
        return self.figures | last


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation report, along with the results it was computed from. There is one result per example, in order."""

    report: EvaluationReport
    results: tuple[ExampleResult, ...]


async def evaluate(
    client: EngineClient,
    examples: Sequence[ChatExample],
    tokenized: Sequence[TokenizedExample],
    *,
    limits: Sequence[int],
    trained: bool = True,
    on_done: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Send all examples to the model and score its answers.

    Args:
        tokenized: the same examples in the same order, as tokenized for training.
        limits: maximum number of tokens per answer; see trainer.evaluation.answer_limit.
        trained: whether the model was trained on similar examples, so that many answers are likely to equal
            the reference. This only affects the time needed.
        on_done: called after each example.

    Raises:
        EngineError: a request failed. No report is created unless all examples have been evaluated.
    """
    started = time.monotonic()
    results = await ask_examples(client, examples, tokenized, limits=limits, trained=trained, on_done=on_done)
    return score_answers(examples, results, time.monotonic() - started)


async def ask_examples(
    client: EngineClient,
    examples: Sequence[ChatExample],
    tokenized: Sequence[TokenizedExample],
    *,
    limits: Sequence[int],
    trained: bool = True,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[ExampleResult, ...]:
    """Send all examples to the model and return the results without a report. For arguments and errors, see
    `evaluate`.
    """
    places, calls = asyncio.Semaphore(CONCURRENCY), any_call_tools(examples)

    async def ask(example: ChatExample, tokens: TokenizedExample, limit: int) -> ExampleResult:
        async with places:
            result = await ask_example(client, example, tokens, limit=limit, trained=trained, find_calls=calls)
            on_done()
            return result

    return tuple(await asyncio.gather(*starmap(ask, zip(examples, tokenized, limits, strict=True))))


async def ask_example(
    client: EngineClient,
    example: ChatExample,
    tokenized: TokenizedExample,
    *,
    limit: int,
    trained: bool = True,
    find_calls: bool = False,
) -> ExampleResult:
    """Send one example to the model and score its answer. For a document, which has no question,
    only the likelihood is measured.

    Args:
        tokenized: the same example as tokenized for training.
        limit: maximum number of tokens in the answer.
        trained: see `evaluate`.
        find_calls: whether any reference in the set calls tools.

    Raises:
        EngineError: a request to the engine failed.
    """
    if example.is_document:  # there is no question that it answers
        nll, scored = -await score(client, tokenized), tokenized.scored
        nothing = {"answer": "", "tokens": 0, "limit": limit, "finish_reason": "stop", "logprob": None, "hit": False}
        return ExampleResult.model_validate({**nothing, "nll": nll, "scored": scored})
    # Scoring computes the whole prompt without the prefix cache, in twice the time of an answer. It fills the cache.
    reference = None if trained else await score(client, tokenized)
    answer = await client.chat(example.prompt, max_tokens=limit, tools=example.tools, find_calls=find_calls)
    if reference is None and _is_reference(answer, tokenized):
        reference = _finite(statistics.fmean(answer.logprobs))
    if reference is None:
        reference = await score(client, tokenized)
    text = comparable_text(answer.text, example)
    return ExampleResult(
        answer=text,
        tokens=answer.tokens,
        limit=limit,
        finish_reason=answer.finish_reason,
        logprob=None if answer.logprob is None else _finite(answer.logprob),
        nll=-reference,
        scored=tokenized.scored,
        hit=matches(text, example.answer),
    )


def _is_reference(answer: Answer, tokenized: TokenizedExample) -> bool:
    """Return whether the answer has the same tokens as the reference, and therefore the same log-probability."""
    whole = len(tokenized.learnt) == 1 and tokenized.learnt[0][1] == len(tokenized.input_ids)
    return whole and answer.token_ids == tokenized.answer and len(answer.logprobs) == len(answer.token_ids)


async def score(client: EngineClient, tokenized: TokenizedExample) -> float:
    """Return the mean natural-log probability of an example's trained-on tokens, each given all preceding tokens.

    Raises:
        EngineError: the engine rejected the request, or returned a log-probability that is not finite.
    """
    logprobs = await client.logprobs(tokenized.input_ids, tokenized.learnt[0][0])
    return _finite(statistics.fmean(tokenized.of_learnt(logprobs)))


async def mean_logprob(client: EngineClient, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Return the mean natural-log probability of an answer's tokens, given its prompt.

    Args:
        prompt, answer: token ids of the prompt and of the answer. Neither may be empty.

    Raises:
        EngineError: the engine rejected the request, or returned a log-probability that is not finite.
    """
    return _finite(statistics.fmean(await client.logprobs([*prompt, *answer], len(prompt))))


def _finite(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise EngineError(
            "the engine returned a non-finite log-probability",
            todo="train again with a lower learning rate, because the weights are unusable",
        )
    return logprob


def score_answers(
    examples: Sequence[ChatExample],
    results: Sequence[ExampleResult],
    seconds: float,
    metrics: Sequence[Metric] | None = None,
) -> Evaluation:
    """Evaluate the given results, recomputing all scores from the answers.

    Args:
        results: one result per example, in the same order.
        seconds: time taken to generate the answers, or 0 if all of them were cached.
        metrics: metrics to compute, primary metric first, or None for the task's default metrics.

    Raises:
        SvcError: a metric failed.
    """
    metrics = metrics or choose_metrics(examples)
    scores = {metric.name: metric.checked_score(Answered(examples, results)) for metric in metrics if metric.scored}
    scored = tuple(
        result.model_copy(update={"scores": {name: column[place] for name, column in scores.items()}})
        for place, result in enumerate(results)
    )
    answered = Answered(examples, scored)
    hits = tuple(result.hit for result in results)
    wants_json = not any_call_tools(examples) and all(is_json(example.answer) for example in examples)
    report = EvaluationReport(
        examples=len(results),
        exact_match=proportion(sum(hits), len(hits)),
        valid_json=proportion(sum(map(is_json, answered.answers)), len(results)) if wants_json else None,
        cut_off=CutOff().estimate(answered),
        nll=Nll().estimate(answered),
        hits=hits,
        seconds=seconds,
        metrics={metric.name: MetricReport.of(metric, metric.estimate(answered)) for metric in metrics},
        primary=metrics[0].name,
    )
    return Evaluation(report, scored)
