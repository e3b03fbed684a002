"""Tests that ROUGE, chrF, perplexity and length equal the results of their libraries and formulas."""

import math
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf

from svc.evaluation.metrics.text import Chrf, Rouge
from svc.evaluation.metrics.tokens import Length, Perplexity
from tests.svc.evaluation.answered import answered, with_scores

words = st.lists(st.sampled_from(["kernel", "module", "for", "the", "Library", "naïve", "日本", "42"]), max_size=8)
texts = words.map(" ".join) | st.text(max_size=20)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=10)


@pytest.mark.slow
@settings(deadline=None)  # the first call imports
@given(pairs, st.sampled_from(["1", "2", "L"]))
def test_rouge_matches_the_rouge_score_package(given_pairs: list[tuple[str, str]], kind: str) -> None:
    scorer, name = RougeScorer(["rouge1", "rouge2", "rougeL"]), f"rouge{kind}"
    expected = [scorer.score(reference, answer)[name].fmeasure for answer, reference in given_pairs]
    metric = Rouge(kind)
    judged = answered(given_pairs)
    assert metric.score(judged) == expected
    assert metric.estimate(with_scores(metric, judged)).value == pytest.approx(fmean(expected))


@pytest.mark.slow
@settings(deadline=None)
@given(pairs)
def test_chrf_equals_the_sacrebleu_score_divided_by_100(given_pairs: list[tuple[str, str]]) -> None:
    expected = [sentence_chrf(answer, [reference]).score / 100 for answer, reference in given_pairs]
    scores = Chrf().score(answered(given_pairs))
    assert scores == pytest.approx(expected)
    assert all(0 <= score <= 1 for score in scores)


def test_perplexity_is_the_exponential_of_the_mean_token_nll() -> None:
    judged = answered([("a", "a")] * 3, nll=[0.5, 1.0, 3.0])
    estimate = Perplexity().estimate(judged)
    assert estimate.value == pytest.approx(math.exp(1.5))
    assert math.exp(0.5) <= estimate.low < estimate.value < estimate.high <= math.exp(3)


def test_perplexity_is_finite_for_a_very_unlikely_answer() -> None:
    assert math.isfinite(Perplexity().estimate(answered([("a", "a")], nll=[1e6])).value)


def test_perplexity_difference_is_paired_by_example() -> None:
    before, after = (answered([("a", "a")] * 30, nll=[nll + place for place in range(30)]) for nll in (0.0, 0.1))
    assert Perplexity().difference(before, after).low > 0


def test_length_metric_is_the_mean_token_count_per_answer() -> None:
    judged = with_scores(Length(), answered([("one", "x"), ("one two three", "y")]))
    assert Length().estimate(judged).value == 3.0
