"""Tests that traffic with near copies of learned prompts is not drift, since the sample has them too."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from monitoring.drift.detector import Baseline, Detector, Requests, Watch
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.drift_reference.drift_sample import draw_drift_sample
from svc.drift_reference.prompt import Prompt, PromptSampler
from svc.drift_reference.reference import KeyedHash
from svc.drift_reference.sample import Sample
from svc.drift_reference.text_embedding import fit_text_space
from tests.monitoring.drift.traffic import TASK, prompts
from tests.svc.chats import chat

pytestmark = pytest.mark.slow

GIVEN, LIVE = 600, 400
HASHES = KeyedHash(bytes(16))


@pytest.fixture(scope="module")
def requests() -> list[ChatExample]:
    """Return requests from one distribution. Every second one is a frequent text with a few words changed."""
    chance = random.Random(0)
    texts = [*(example.question for example in read_examples(TASK / "train.jsonl")), *prompts("none")]
    chance.shuffle(texts)
    frequent, rare = texts[:50], iter(texts[50:])
    drawn = [_varied(chance, chance.choice(frequent)) if chance.random() < 0.5 else next(rare) for _ in range(1000)]
    return [chat(text, "libs") for text in drawn]


def _varied(chance: random.Random, text: str) -> str:
    words = text.split(" ")
    for _ in range(max(1, len(words) // 40)):
        words[chance.randrange(len(words))] = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6))
    return " ".join(words)


def alarms(known: Sequence[ChatExample], reference: Sequence[ChatExample], live: list[ChatExample]) -> list[str]:
    """Return the features that raise an alarm.

    Args:
        known: prompts used to build the text space.
    """
    sampler = PromptSampler(fit_text_space([one.question for one in known], [one.answer for one in known]))
    held, seen = (sampler.sample([Prompt(one.question) for one in part]) for part in (reference, live))
    held_words, seen_words = ([HASHES.words(one.question) for one in part] for part in (reference, live))
    numbers = np.arange(len(live), dtype=np.int64)
    times = np.asarray(numbers * 60.0, dtype=np.float64)
    new = Requests(seen, Sample(seen.size), seen_words, numbers, times, [""] * seen.size)
    nothing = new.at(np.zeros(0, dtype=np.intp))
    found = Detector(Baseline(held, held_words, Sample(0))).advance(Watch(), nothing, [], new)
    return [event.feature for event in found.events if event.alarm]


def test_comparing_unchanged_traffic_with_the_drift_sample_causes_no_alarm(requests: list[ChatExample]) -> None:
    drawn = draw_drift_sample(requests[:GIVEN], 0)
    assert alarms(drawn.rest, drawn.sample, requests[GIVEN:][:LIVE]) == []


def test_reference_sample_that_was_also_used_to_fit_the_text_space_causes_a_false_alarm(
    requests: list[ChatExample],
) -> None:
    """Shows why the reference sample is excluded from the text space."""
    drawn = draw_drift_sample(requests[:GIVEN], 0)
    assert alarms([*drawn.rest, *drawn.sample], drawn.sample, requests[GIVEN:][:LIVE]) != []
