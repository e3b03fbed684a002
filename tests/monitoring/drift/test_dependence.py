"""Tests that dependence is estimated from the similarity of neighbouring requests and from conversations."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from monitoring.drift.dependence import MAX_LAG, Resemblances

SIZE = 800
USUAL = 0.5


def dependence(
    among: NDArray[np.float32],
    stop: int,
    conversations: NDArray[np.int64],
    usual: float,
    codes: Sequence[NDArray[np.intp]] = (),
    usually_shared: Sequence[float] = (),
) -> float:
    return Resemblances(among, among, codes, usual, usually_shared).dependence(0, stop, conversations)


def similarities(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the pairwise similarities of items, which are 1 at distance 0."""
    squares = (vectors**2).sum(axis=1)
    distances = squares[:, None] + squares[None] - 2 * vectors @ vectors.T
    return np.asarray(np.exp(-np.maximum(distances, 0) / vectors.shape[1]), dtype=np.float32)


def runs(length: int, seed: int = 1, size: int = SIZE) -> NDArray[np.float64]:
    """Return items that come in runs of one topic."""
    generator = np.random.default_rng(seed)
    topics = generator.normal(size=(size // length + 1, 8))
    return np.asarray(np.repeat(topics, length, axis=0)[:size] + 0.3 * generator.normal(size=(size, 8)))


def one_each(size: int = SIZE) -> NDArray[np.int64]:
    return np.arange(size, dtype=np.int64)


def test_dependence_distance_is_1_for_independent_items() -> None:
    assert [dependence(similarities(runs(1, seed)), SIZE, one_each(), USUAL) for seed in range(5)] == [1] * 5


@pytest.mark.parametrize(("length", "least", "most"), [(5, 4, 6), (20, 14, 22)])
def test_dependence_distance_is_close_to_the_number_of_consecutive_items_with_one_topic(
    length: int, least: int, most: int
) -> None:
    estimate = dependence(similarities(runs(length)), SIZE, one_each(), USUAL)
    assert least <= estimate <= most


def test_dependence_distance_is_at_most_64() -> None:
    assert dependence(similarities(runs(200)), SIZE, one_each(), USUAL) == MAX_LAG


def test_dependence_distance_is_about_5_for_interleaved_conversations_of_5_items() -> None:
    # Eight conversations with random topics take turns.
    numbers = np.arange(SIZE, dtype=np.int64)
    conversations = numbers // 40 * 8 + numbers % 8
    estimate = dependence(similarities(runs(1)), SIZE, conversations, USUAL)
    assert estimate == pytest.approx(5, abs=0.2)


def test_dependence_distance_is_high_if_one_conversation_has_most_items() -> None:
    conversations = np.concatenate([np.zeros(300, np.int64), np.arange(1, 501, dtype=np.int64)])
    estimate = dependence(similarities(runs(1)), SIZE, conversations, USUAL)
    assert estimate > 30


@pytest.mark.parametrize("changed", [1, MAX_LAG])
def test_dependence_distance_is_unaffected_by_changes_in_the_newest_64_requests(changed: int) -> None:
    vectors, conversations = runs(1), one_each()
    before = dependence(similarities(vectors), SIZE, conversations, USUAL)
    vectors[-changed:] = 9.0
    conversations[-changed:] = -1
    assert dependence(similarities(vectors), SIZE, conversations, USUAL) == before


def test_dependence_estimate_uses_only_the_first_n_items() -> None:
    vectors = runs(5)
    before = dependence(similarities(vectors[:600]), 600, one_each(600), USUAL)
    vectors[600:] = 9.0
    assert dependence(similarities(vectors), 600, one_each(), USUAL) == before


def test_dependence_estimate_ignores_items_older_than_the_window() -> None:
    vectors = runs(5, size=1_000)
    among = similarities(vectors)
    assert dependence(among, 1_000, one_each(1_000), USUAL) == dependence(among[200:, 200:], 800, one_each(), USUAL)


def test_items_up_to_64_apart_are_assumed_to_be_dependent_if_there_are_too_few_items() -> None:
    sizes = (0, 1, 20, 40)
    streams = [similarities(runs(1, size=max(1, size))) for size in sizes]
    assert {dependence(among, size, one_each(size), USUAL) for among, size in zip(streams, sizes, strict=True)} == {
        MAX_LAG
    }


@pytest.mark.parametrize("size", [60, 100, 200])
def test_dependence_distance_is_estimated_after_60_items_if_they_resemble_the_reference(size: int) -> None:
    usual = float(similarities(runs(1, seed=20, size=200))[np.triu_indices(200, 1)].mean())
    streams = [similarities(runs(1, seed, size)) for seed in range(10)]
    assert [dependence(among, size, one_each(size), usual) for among in streams].count(1) >= 8


@pytest.mark.parametrize("size", [60, 100, 200])
def test_maximum_dependence_distance_is_assumed_while_all_items_are_from_one_burst(size: int) -> None:
    usual = float(similarities(runs(1, seed=2, size=200))[np.triu_indices(200, 1)].mean())
    assert dependence(similarities(runs(size, size=size)), size, one_each(size), usual) == MAX_LAG


def test_dependence_distance_is_1_if_all_items_are_identical() -> None:
    """A uniform stream has no runs, so neighbours are as similar as any two items."""
    assert dependence(np.ones((SIZE, SIZE), np.float32), SIZE, one_each(), USUAL) == 1


def test_maximum_dependence_distance_is_assumed_if_items_share_feature_values_more_often_than_reference_items() -> None:
    among, usual = similarities(runs(1, size=100)), 0.9
    label = np.zeros(100, dtype=np.intp)
    assert dependence(among, 100, one_each(100), usual, [label], [1.0]) == 1
    assert dependence(among, 100, one_each(100), usual, [label], [0.1]) == MAX_LAG
