"""The one evaluator: the trainer, the gates and the monitoring all judge by it, through the endpoint that serves.

Greedy answers are compared with references; the reference's own log-probability shows what exact match is too coarse
for. Knows nothing of who asks and of what is done with the report.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.engine.vllm.client import ENDED, Answer, EngineClient
from svc.errors import EngineError
from svc.evaluation.metrics import Estimate, is_json, matches, mean, proportion
from svc.evaluation.results import ExampleResult

CONCURRENCY = 16
"""So many requests are under way together."""


class EvaluationReport(BaseModel):
    """How good the answers to a held-out set are.

    Attributes:
        examples: how many were asked.
        exact_match: share of answers equal to the reference.
        valid_json: share of answers that are JSON; None when the references are not.
        nll: negative log-likelihood of the reference answer, nats a token, mean over examples.
        hits: exact match of each example, for paired comparison.
        seconds: time for all answers and scores; 0 where they were known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: int
    exact_match: Estimate
    valid_json: Estimate | None
    nll: Estimate
    hits: tuple[bool, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of a prompt, up to where the answer begins, and of the reference answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures, and what they were made of: one result for each example, in their order."""

    report: EvaluationReport
    results: tuple[ExampleResult, ...]


async def evaluate(
    client: EngineClient,
    examples: Sequence[ChatExample],
    *,
    max_tokens: int,
    trained: bool = True,
    on_done: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Asks all examples and scores the answers.

    Args:
        max_tokens: longest answer, tokens.
        trained: on such examples, so that many answers will be the reference; decides the time and nothing else.
        on_done: called after each example.

    Raises:
        EngineError: the engine failed a request; there is no report over a part of the examples.
    """
    places = asyncio.Semaphore(CONCURRENCY)

    async def ask(example: ChatExample) -> ExampleResult:
        async with places:
            result = await ask_example(client, example, max_tokens=max_tokens, trained=trained)
            on_done()
            return result

    started = time.monotonic()
    results = tuple(await asyncio.gather(*(ask(example) for example in examples)))
    return judge(examples, results, time.monotonic() - started)


async def ask_example(
    client: EngineClient, example: ChatExample, *, max_tokens: int, trained: bool = True
) -> ExampleResult:
    """Asks one example and scores the answer.

    Args:
        max_tokens: longest answer, tokens.
        trained: as for `evaluate`.

    Raises:
        EngineError: the engine failed a request.
    """
    tokenized = await tokenize(client, example)
    # Scoring reads the whole prompt, past the prefix cache, and takes twice the time of an answer. It fills the cache.
    reference = None if trained else await mean_logprob(client, tokenized.prompt, tokenized.answer)
    answer = await client.chat(example.prompt, max_tokens=max_tokens, tools=example.tools)
    if reference is None and answer.logprob is not None and _is_reference(answer, example.answer, tokenized):
        reference = _finite(answer.logprob)
    if reference is None:
        reference = await mean_logprob(client, tokenized.prompt, tokenized.answer)
    return ExampleResult(
        answer=answer.text,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        logprob=None if answer.logprob is None else _finite(answer.logprob),
        nll=-reference,
        hit=matches(answer.text, example.answer),
    )


def _is_reference(answer: Answer, reference: str, tokenized: TokenizedExample) -> bool:
    """Whether the model gave the reference token by token, so that the answer's log-probability is the reference's."""
    whole = answer.finish_reason == ENDED and answer.tokens == len(tokenized.answer) + 1
    return whole and answer.text == reference


async def tokenize(client: EngineClient, example: ChatExample) -> TokenizedExample:
    """Token ids of an example, by the engine's tokenizer and chat template."""
    prompt = await client.prompt_tokens(example.prompt, example.tools)
    answer = await client.tokens(example.answer)
    return TokenizedExample(tuple(prompt), tuple(answer))


async def mean_logprob(client: EngineClient, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean natural-log probability of an answer's tokens, given a prompt.

    Args:
        prompt, answer: token ids, one at least of each.

    Raises:
        EngineError: the engine refused, or gave no finite number.
    """
    return _finite(statistics.fmean(await client.logprobs([*prompt, *answer], len(prompt))))


def _finite(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise EngineError(
            "the engine gave a log-probability that is no finite number",
            todo="the weights are not usable: train again, with a lower learning rate",
        )
    return logprob


def judge(examples: Sequence[ChatExample], results: Sequence[ExampleResult], seconds: float) -> Evaluation:
    """The figures of results.

    Args:
        results: one for each example, in the same order.
        seconds: that asking took; 0 where all were known.
    """
    hits = tuple(result.hit for result in results)
    wants_json = all(is_json(example.answer) for example in examples)
    valid = proportion(sum(is_json(result.answer) for result in results), len(results)) if wants_json else None
    report = EvaluationReport(
        examples=len(results),
        exact_match=proportion(sum(hits), len(hits)),
        valid_json=valid,
        nll=mean([result.nll for result in results]),
        hits=hits,
        seconds=seconds,
    )
    return Evaluation(report, tuple(results))
