"""Tests that accuracy and macro-F1 equal scikit-learn's results on the same labels."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from svc.evaluation.metrics.labels import Accuracy, MacroF1, label_of
from tests.svc.evaluation.answered import answered, with_scores

labels = st.sampled_from(["net", "admin", "doc", "x11"])
answers = st.one_of(labels, st.sampled_from(["nonsense", "", "Net", '{"section": "doc"}', '{"section":"java"}']))
pairs = st.lists(st.tuples(answers, labels), min_size=1, max_size=40)


@pytest.mark.parametrize(
    "answer", ["net", " net\n", "NET", '{"section":"net"}', '{ "section": "Net" }', '{"other":"net"}']
)
def test_label_is_recognized_in_plain_text_or_json_regardless_of_spacing_and_case(answer: str) -> None:
    assert label_of(answer) == "net"


@pytest.mark.parametrize("answer", ["", "nets", '["net"]', '{"a":"net","b":1}', "net " * 20])
def test_text_that_is_not_a_label_matches_no_label(answer: str) -> None:
    assert label_of(answer) != "net"


@pytest.mark.slow
@given(pairs)
def test_label_accuracy_matches_scikit_learn(given_pairs: list[tuple[str, str]]) -> None:
    judged = with_scores(Accuracy(), answered(given_pairs))
    right = [label_of(reference) for reference in judged.references]
    expected = accuracy_score(right, [label_of(answer) for answer in judged.answers])
    assert Accuracy().estimate(judged).value == pytest.approx(expected)


@pytest.mark.slow
@given(pairs)
def test_macro_f1_matches_scikit_learn_over_reference_labels(given_pairs: list[tuple[str, str]]) -> None:
    judged = answered(given_pairs)
    right = [label_of(reference) for reference in judged.references]
    given_labels = [label_of(answer) for answer in judged.answers]
    expected = f1_score(right, given_labels, labels=sorted(set(right)), average="macro", zero_division=0)
    estimate = MacroF1().estimate(judged)
    assert estimate.value == pytest.approx(expected)
    assert 0 <= estimate.low <= estimate.high <= 1


def test_macro_f1_penalizes_a_never_predicted_rare_label_more_than_accuracy() -> None:
    judged = with_scores(Accuracy(), answered([("net", "net")] * 95 + [("net", "doc")] * 5))
    assert Accuracy().estimate(judged).value == 0.95
    assert MacroF1().estimate(judged).value < 0.5


def test_macro_f1_difference_of_two_models_is_paired_by_example() -> None:
    before = answered([("net", "net"), ("doc", "doc")] * 20)
    after = answered([("net", "net"), ("net", "doc")] * 20)
    difference = MacroF1().difference(before, after)
    assert difference.value == pytest.approx(1 / 3 - 1)
    assert difference.high < 0
    assert MacroF1().difference(before, before).high == 0


@pytest.mark.slow
def test_macro_f1_of_1000_answers_is_fast() -> None:
    judged = answered([(f"label {place % 20}", f"label {place % 19}") for place in range(1000)])
    MacroF1().estimate(judged)
    started = time.process_time()
    MacroF1().estimate(judged)
    assert time.process_time() - started < 0.4  # two cores' worth of one product of matrices
