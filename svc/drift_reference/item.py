"""Creates drift items from live requests, and collects the items into samples.

A drift item contains the features of one request. The same code computes the features of the reference, so that live
requests can be compared with it. This module knows nothing about how items are stored.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.answer import AnswerFeature, ComparedAnswer, compared_logprob, is_greedy
from svc.drift_reference.reference import Reference, read_prompt
from svc.drift_reference.sample import NOT_THERE, Sample
from svc.errors import NotFoundError
from svc.store.drift_items import Item
from svc.store.requests import RequestRecord


class ItemMaker:
    """Creates a drift item from each request to a version that was served in a given format.

    Raises:
        NotFoundError: the version has no prompts to compare with.
    """

    def __init__(self, reference: Reference) -> None:
        if reference.prompt_sampler is None or reference.prompts is None:
            raise NotFoundError(reference.missing)
        self._prompt_sampler = reference.prompt_sampler
        self._reference = reference

    def make(self, records: Sequence[RequestRecord]) -> list[Item]:
        """Return a drift item for each record.

        Args:
            records: requests, including their redacted prompts and answers.
        """
        prompts = [read_prompt(record.prompt or "") for record in records]
        sample, answers = self._prompt_sampler.sample(prompts), self._answers(records)
        topic, wanted = (view.astype(np.float32) for view in sample.views)
        hashes = self._reference.hashes
        return [
            Item(
                record.request_id,
                record.started_at,
                prompt=_features(sample, place),
                answer={name: _known(value) for name, value in _features(answers, place).items()},
                topic=topic[place],
                wanted=wanted[place],
                words=hashes.words(prompt.text),
                conversation=hashes.conversation(prompt.opening),
            )
            for place, (record, prompt) in enumerate(zip(records, prompts, strict=True))
        ]

    def _answers(self, records: Sequence[RequestRecord]) -> Sample:
        """Return the features of the answers, except for log-probabilities, because no answer has been scored yet."""
        sampler = self._reference.answer_sampler
        if sampler is None:
            return Sample(len(records))
        sample = sampler.sample(
            [
                ComparedAnswer(
                    record.answer,
                    record.tokens_out,
                    record.finish_reason,
                    logprob=None,
                    greedy=is_greedy(record.temperature, record.max_tokens, sampler.cut),
                )
                for record in records
            ]
        )
        numbers = {name: values for name, values in sample.numbers.items() if name != AnswerFeature.LOGPROB}
        return Sample(sample.size, numbers, sample.categories)


def prompt_sample(items: Sequence[Item], like: Sample) -> Sample:
    """Collect the prompt features of the items into a sample.

    Args:
        like: the reference's sample, which determines the features of the result. A feature that an item
            lacks is marked as missing.
    """
    views = [np.array([item.topic for item in items]), np.array([item.wanted for item in items])]
    shaped = (
        view.astype(np.float64).reshape(len(items), wanted.shape[1])
        for view, wanted in zip(views, like.views, strict=True)
    )
    return _sample([item.prompt for item in items], like, tuple(shaped))


def answer_sample(items: Sequence[Item], logprobs: Sequence[float | None], like: Sample) -> Sample:
    """Collect the answer features of the items into a sample.

    Args:
        logprobs: log-probability of each answer, or None if it has not been scored.
        like: the reference's sample, which determines the features of the result. A feature that an item
            lacks is marked as missing.
    """
    rows: list[Mapping[str, float | str | None]] = []
    for item, logprob in zip(items, logprobs, strict=True):
        greedy = item.answer.get(AnswerFeature.TOKENS) is not None
        rows.append({**item.answer, AnswerFeature.LOGPROB: _known(compared_logprob(logprob, greedy=greedy))})
    return _sample(rows, like)


def _features(sample: Sample, place: int) -> dict[str, float | str]:
    numbers = {name: float(values[place]) for name, values in sample.numbers.items()}
    return numbers | {name: str(values[place]) for name, values in sample.categories.items()}


def _known(value: float | str) -> float | str | None:
    missing = value == NOT_THERE or (isinstance(value, float) and math.isnan(value))
    return None if missing else value


def _sample(
    rows: Sequence[Mapping[str, float | str | None]], like: Sample, views: tuple[NDArray[np.float64], ...] = ()
) -> Sample:
    numbers: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in like.numbers}
    categories: dict[str, list[Any]] = {name: [row.get(name) or NOT_THERE for row in rows] for name in like.categories}
    return Sample.of(len(rows), numbers, categories, views)
