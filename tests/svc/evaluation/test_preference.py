"""Tests preference accuracy on the figures of pairs, and on the engine double."""

import pytest

from svc.evaluation.preference import PairScores, PreferenceReport, score_pairs
from tests.serving.engine_double import EngineDouble, logprob_of, tokenized
from tests.svc.engine.in_process import client_of
from tests.trainer.tiny_model import make_example

BASE = PairScores(chosen=(-9.0, -2.0, -3.0, -4.0), rejected=(-1.0, -3.0, -1.0, -5.0))
TRAINED = PairScores(chosen=(-5.0, -2.0, -1.0, -4.5), rejected=(-4.0, -9.0, -2.0, -5.0))


def test_preference_accuracy_is_the_share_of_pairs_whose_chosen_answer_is_more_likely() -> None:
    report = PreferenceReport.of(TRAINED)
    assert report.accuracy.value == 0.75
    assert report.accuracy.low < 0.75 < report.accuracy.high
    assert report.margin.value == pytest.approx((-1 + 7 + 1 + 0.5) / 4)
    assert report.reward_accuracy is None


def test_reward_accuracy_is_the_share_of_pairs_whose_chosen_answer_has_the_higher_reward() -> None:
    report = PreferenceReport.of(TRAINED, BASE)
    assert report.reward_accuracy and report.reward_accuracy.value == 0.75  # the fourth lost 0.5 nats
    assert report.reward_margin and report.reward_margin.value == pytest.approx((7 + 6 + 3 - 0.5) / 4)


def test_equal_likelihoods_are_not_counted_as_a_preference_for_the_chosen_answer() -> None:
    same = PairScores(chosen=(-1.0,), rejected=(-1.0,))
    assert PreferenceReport.of(same).accuracy.value == 0


async def test_answers_of_a_pair_are_scored_by_the_sum_of_their_token_log_probabilities() -> None:
    double = EngineDouble(weights="/run/merged", name="tiny")
    pair = tokenized(make_example("question", "a long answer")), tokenized(make_example("question", "short"))
    async with client_of(double, double.name) as client:
        scores = await score_pairs(client, [pair])
    sums = [
        sum(logprob_of("/run/merged", row.input_ids[at], at) for at in range(row.learnt[0][0], row.learnt[0][1]))
        for row in pair
    ]
    assert (*scores.chosen, *scores.rejected) == pytest.approx(sums)
