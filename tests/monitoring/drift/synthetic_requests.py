"""Draws requests at random with the features of real requests, without texts or a store."""

from dataclasses import replace

import numpy as np

from monitoring.drift.detector import Baseline, Requests
from svc.drift_reference.sample import NOT_THERE, Floats, Sample

TOPIC_AXES, ANSWER_AXES = 6, 3
MINUTE = 60.0
_FORM = np.arange(1_000_000, 1_000_014, dtype=np.int32)


def draw_requests(
    seed: int,
    size: int,
    *,
    first: int = 0,
    moved: float = 0.0,
    longer: float = 1.0,
    answers_longer: float = 1.0,
    cut: float = 0.03,
    repeats: float = 0.0,
    templated: float = 0.0,
    run: int = 1,
) -> Requests:
    """Return requests, one per minute.

    Args:
        first: position of the first request in its stream.
        moved: distance by which the topics have moved.
        longer: factor by which the prompts are longer.
        answers_longer: factor by which the answers are longer.
        cut: share of answers that were cut off.
        repeats: share of requests with the words of one of the previous 30 requests.
        templated: share of requests that fill in a form, whose words are rare at first and soon become
            common.
        run: number of consecutive requests on one topic.
    """
    generator = np.random.default_rng(seed)
    topics = np.repeat(generator.normal(size=(size // run + 1, TOPIC_AXES)), run, axis=0)[:size]
    if run > 1:
        topics = topics + 0.3 * generator.normal(size=topics.shape)
    prompts = Sample(
        size,
        {
            "characters": np.round(longer * generator.lognormal(4, 0.5, size)),
            "symbols": np.where(generator.random(size) < 0.7, 0.0, generator.random(size)),
        },
        {"language": generator.choice(["en", "de", "fr"], size, p=[0.8, 0.17, 0.03])},
        (topics + moved, generator.normal(size=(size, ANSWER_AXES)) + moved),
    )
    answers = Sample(
        size,
        {"answer_tokens": np.round(answers_longer * generator.lognormal(2, 0.4, size))},
        {"finish_reason": np.where(generator.random(size) < cut, "length", "stop")},
    )
    words = [np.sort(generator.choice(1_000_000, 12, replace=False)).astype(np.int32) for _ in range(size)]
    for place in range(1, size):
        if generator.random() < templated:
            words[place] = np.concatenate([words[place][:6], _FORM])
        if generator.random() < repeats:
            words[place] = words[generator.integers(max(0, place - 30), place)]
    numbers = np.arange(first, first + size, dtype=np.int64)
    return Requests(prompts, answers, words, numbers, np.asarray(numbers * MINUTE, dtype=np.float64), [""] * size)


def baseline_of(requests: Requests) -> Baseline:
    """Return the given requests as a drift baseline."""
    return Baseline(requests.prompts, requests.words, requests.answers)


def without_answers(requests: Requests) -> Requests:
    """Return the same requests without answer features."""
    numbers: dict[str, Floats] = {name: np.full(requests.size, np.nan) for name in requests.answers.numbers}
    categories = {name: np.full(requests.size, NOT_THERE) for name in requests.answers.categories}
    return replace(requests, answers=Sample(requests.size, numbers, categories))
