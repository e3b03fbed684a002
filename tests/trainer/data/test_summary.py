"""Tests the statistics of a data set."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import IntegrityError
from tests.svc.chats import chat
from trainer.data.summary import Lengths, read_data_summary, summarize_data

SENTENCE = (
    "the quick brown fox jumps over the lazy dog beside a river that is wide and slow in the evening light of May"
)
SECRET = "the launch code is tangerine"


@given(st.lists(st.integers(0, 10**7), min_size=1))
def test_every_text_is_counted_in_exactly_one_histogram_bin(lengths: list[int]) -> None:
    found = Lengths.of(lengths)
    assert sum(found.counts) == len(lengths)
    assert len(found.edges) == len(found.counts) + 1
    assert found.median <= found.p95 <= found.longest == max(1, *lengths)


def test_length_quantiles_are_values_that_occur_in_the_data() -> None:
    found = Lengths.of([1] * 50 + [7] * 45 + [100] * 5)
    assert (found.median, found.p95, found.longest) == (1, 7, 100)


def test_label_counts_ignore_case_and_spacing() -> None:
    answers = ["Net", '{"section": "net"}', "games", "net", "games", "net"]
    summary = summarize_data([chat(f"q {place}", answer) for place, answer in enumerate(answers)], [])
    assert summary.labels == {"net": 4, "games": 2}


def test_general_examples_are_excluded_from_label_counts() -> None:
    train = [chat(f"q {place}", ("yes", "no")[place % 2]) for place in range(6)]
    assert summarize_data([*train, chat("q", "Paris")], [], general=1).labels == {"yes": 3, "no": 3}


def test_answers_are_not_treated_as_labels_when_they_are_all_different() -> None:
    assert summarize_data([chat(f"q {place}", f"a {place}") for place in range(6)], []).labels == {}


def test_near_duplicates_are_counted_within_the_training_split_and_between_splits() -> None:
    train = [chat(SENTENCE), chat(SENTENCE.upper()), chat("another question altogether, and what of it?")]
    summary = summarize_data(train, [chat(f"{SENTENCE}!"), chat("what is new here was never asked before")])
    assert (summary.near_duplicates, summary.near_heldout) == (1, 1)


def test_data_summary_contains_no_example_text() -> None:
    train = [chat(f"{SECRET} {place}", SECRET + " x" * place) for place in range(60)]
    assert "tangerine" not in summarize_data(train, train[:2]).model_dump_json()


def test_written_data_summary_round_trips(tmp_path: Path) -> None:
    summary, path = summarize_data([chat("a"), chat("b")], [chat("c")]), tmp_path / "summary.json"
    path.write_text(summary.model_dump_json(), "utf-8")
    assert read_data_summary(path) == summary


@pytest.mark.parametrize("content", [None, "{", json.dumps({"train": 1})])
def test_file_that_is_not_a_data_summary_is_rejected(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(IntegrityError, match=r"summary\.json"):
        read_data_summary(path)
