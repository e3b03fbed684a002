"""Tests the confusion matrix against scikit-learn's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as of_sklearn

from tests.builders.judged_versions import answer
from tests.svc.chats import chat
from trainer.report.report import ConfusionMatrix, confusion_matrix

LABELS = ("admin", "games", "net")


def matrix(pairs: list[tuple[str, str]]) -> ConfusionMatrix | None:
    """Return the confusion matrix of pairs of references and answers."""
    examples = [chat(f"q {place}", reference) for place, (reference, _) in enumerate(pairs)]
    return confusion_matrix(examples, [answer(given, reference) for reference, given in pairs])


@pytest.mark.slow
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=6))
def test_confusion_matrix_matches_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    pairs += [(label, label) for label in LABELS]
    confusion = matrix(pairs)
    assert confusion is not None
    assert (confusion.labels, confusion.given) == (LABELS, LABELS)
    wanted = of_sklearn([one for one, _ in pairs], [other for _, other in pairs], labels=LABELS)
    assert [list(row) for row in confusion.counts] == wanted.tolist()


def test_answers_that_are_not_labels_have_a_separate_confusion_matrix_column() -> None:
    confusion = matrix([("net", "net"), ("net", "I do not know"), ("games", "games"), ("games", "net")] * 2)
    assert confusion is not None
    assert confusion.given == ("games", "net", "(no label)")
    assert confusion.counts == ((2, 2, 0), (0, 2, 2))


def test_confusion_matrix_ignores_label_case_and_format() -> None:
    confusion = matrix([("net", '{"section": "Net"}'), ("net", "NET "), ("games", "games"), ("games", "Games")])
    assert confusion is not None
    assert confusion.counts == ((2, 0), (0, 2))


def test_rare_labels_are_combined_in_a_large_confusion_matrix() -> None:
    pairs = [(f"label {place:02}", f"label {place:02}") for place in range(30) for _ in range(2 + (place < 25))]
    confusion = matrix(pairs)
    assert confusion is not None
    assert len(confusion.labels) == 26
    assert confusion.labels[-1] == "(other labels)"
    assert confusion.counts[-1][-1] == 10
    assert sum(map(sum, confusion.counts)) == len(pairs)


@pytest.mark.parametrize("pairs", [[], [(f"a long answer, number {place}", "a") for place in range(9)]])
def test_free_text_answers_have_no_confusion_matrix(pairs: list[tuple[str, str]]) -> None:
    assert matrix(pairs) is None
