"""Tests that accepted traffic survives the store, without pickled objects."""

import io
from dataclasses import replace

import numpy as np
import pytest

from monitoring.drift.check import baseline_bytes, read_baseline
from monitoring.drift.detector import Baseline, Detector
from svc.drift_reference.sample import NOT_THERE, Sample
from tests.monitoring.drift.synthetic_requests import baseline_of, draw_requests

BASELINE = baseline_of(draw_requests(1, 60))


def assert_equal_samples(one: Sample, other: Sample) -> None:
    assert (one.size, list(one.numbers), list(one.categories)) == (
        other.size,
        list(other.numbers),
        list(other.categories),
    )
    for columns, others in ((one.numbers, other.numbers), (one.categories, other.categories)):
        for name, values in columns.items():
            np.testing.assert_array_equal(values, others[name])
    assert len(one.views) == len(other.views)
    for view, other_view in zip(one.views, other.views, strict=True):
        np.testing.assert_array_equal(view, other_view)


def assert_survives(baseline: Baseline) -> None:
    read = read_baseline(baseline_bytes(baseline))
    assert_equal_samples(read.prompts, baseline.prompts)
    assert_equal_samples(read.answers, baseline.answers)
    assert [words.tolist() for words in read.words] == [words.tolist() for words in baseline.words]
    assert all(words.dtype == np.int32 for words in read.words)


def test_baseline_survives_a_storage_round_trip() -> None:
    assert_survives(BASELINE)


def test_baseline_with_missing_values_survives_a_storage_round_trip() -> None:
    numbers = {"answer_tokens": np.array([np.nan, 3.0])}
    categories = {"finish_reason": np.array([NOT_THERE, "stop"])}
    assert_survives(replace(BASELINE, answers=Sample(2, numbers, categories)))


@pytest.mark.parametrize("size", [0, 60])
def test_baseline_without_answer_features_survives_a_storage_round_trip(size: int) -> None:
    assert_survives(replace(BASELINE, answers=Sample(size)))


def test_baseline_without_answers_survives_a_storage_round_trip() -> None:
    assert_survives(replace(BASELINE, answers=BASELINE.answers.part(0, 0)))


@pytest.mark.parametrize("size", [0, 1])
def test_baseline_with_zero_or_one_prompt_survives_a_storage_round_trip(size: int) -> None:
    assert_survives(baseline_of(draw_requests(1, size)))


def test_baseline_without_words_or_text_vectors_survives_a_storage_round_trip() -> None:
    none = np.zeros((60, 0))
    prompts = replace(BASELINE.prompts, views=(none, none))
    assert_survives(Baseline(prompts, [np.zeros(0, np.int32)] * 60, BASELINE.answers))


def test_stored_baseline_contains_no_pickled_objects() -> None:
    with np.load(io.BytesIO(baseline_bytes(BASELINE)), allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)


def test_baseline_file_with_pickled_objects_is_rejected() -> None:
    file = io.BytesIO()
    np.savez(file, words=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_baseline(file.getvalue())


def test_stored_baseline_yields_the_same_drift_bets_as_the_original_baseline() -> None:
    stored, new = Detector(read_baseline(baseline_bytes(BASELINE))), Detector(BASELINE)
    assert stored.signals == new.signals
    assert stored.classifier.far_bounds.tolist() == new.classifier.far_bounds.tolist()
