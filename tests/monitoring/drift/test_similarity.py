"""Tests the similarity of prompts and the classifier that detects new prompts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.drift.domain_classifier import Similarity, separation, typical
from svc.drift_reference.sample import Floats

WIDTHS = (1.0, 0.55)


def draw(seed: int, *shape: int, at: float = 0.0) -> Floats:
    return np.random.default_rng(seed).normal(at, 1.0, shape)


def similarities(reference: Floats, live: Floats) -> Floats:
    both = [np.concatenate([reference, live])]
    return Similarity([reference], [1.0])(both, both)


def moved(reference: int = 40, live: int = 10, by: float = 6.0) -> Floats:
    """Return the similarities of two groups that are far apart."""
    return similarities(draw(1, reference, 3), draw(2, live, 3, at=by))


def test_prompt_has_similarity_1_to_itself() -> None:
    views = [draw(1, 20, 5), draw(2, 20, 3)]
    assert np.diag(Similarity(views, WIDTHS)(views, views)) == pytest.approx(1)


def test_similarity_of_two_groups_is_symmetric() -> None:
    ones, others = [draw(1, 20, 5), draw(2, 20, 3)], [draw(3, 8, 5), draw(4, 8, 3)]
    similarity = Similarity(ones, WIDTHS)
    assert similarity(ones, others) == pytest.approx(similarity(others, ones).T)


def test_similarity_is_between_0_and_1() -> None:
    views = [draw(1, 20, 5), draw(2, 20, 3)]
    far = [draw(3, 8, 5, at=1e6), draw(4, 8, 3, at=-1e6)]
    found = Similarity(views, WIDTHS)(views, far)
    assert found.min() >= 0 and found.max() <= 1


def test_similarities_are_unchanged_if_all_distances_are_scaled() -> None:
    views = [draw(1, 20, 5)]
    wide = [1000 * views[0]]
    assert Similarity(views, [1.0])(views, views) == pytest.approx(Similarity(wide, [1.0])(wide, wide))


def test_similarities_are_unchanged_if_kernel_width_and_distances_are_halved() -> None:
    views, halved = [draw(1, 20, 5)], [draw(1, 20, 5) / 2]
    narrow, wide = Similarity(views, [0.5]), Similarity(views, [1.0])
    assert narrow(halved, halved) == pytest.approx(wide(views, views))


@pytest.mark.parametrize("flat", [np.zeros((20, 3)), np.full((20, 3), 0.1), np.zeros((20, 0))])
def test_embedding_that_does_not_vary_across_reference_prompts_is_ignored(flat: Floats) -> None:
    view = draw(1, 20, 5)
    alone, both = Similarity([view], [1.0]), Similarity([view, flat], WIDTHS)
    assert both([view, flat], [view, flat]) == pytest.approx(alone([view], [view]))


def test_all_similarities_are_1_if_no_embedding_varies_across_reference_prompts() -> None:
    reference, live = [np.zeros((20, 3)), np.zeros((20, 0))], [draw(1, 4, 3), np.zeros((4, 0))]
    assert (Similarity(reference, WIDTHS)(live, reference) == np.ones((4, 20))).all()


@pytest.mark.parametrize("size", [1, 2])
def test_similarities_are_finite_for_a_reference_of_one_or_two_prompts(size: int) -> None:
    views = [draw(1, size, 3)]
    assert np.isfinite(Similarity(views, [1.0])(views, views)).all()


def test_distant_groups_are_fully_separated() -> None:
    assert separation(moved(), 10) == pytest.approx(1)


def test_separation_of_groups_with_the_same_distribution_is_low() -> None:
    assert separation(similarities(draw(1, 200, 3), draw(2, 100, 3)), 100) < 0.6


def test_separation_is_one_half_if_all_prompts_are_identical() -> None:
    assert separation(np.ones((50, 50)), 10) == 0.5


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
def test_area_under_the_classifiers_roc_curve_is_between_one_half_and_1(seed: int, reference: int, live: int) -> None:
    matrix = draw(seed, reference + live, reference + live)
    assert 0.5 <= separation(matrix + matrix.T, live) <= 1


def test_live_prompts_that_are_unlike_the_reference_rank_first() -> None:
    live = draw(2, 12, 3)
    live[[3, 7, 8]] += 6
    assert set(typical(similarities(draw(1, 40, 3), live), 12, 3)) == {3, 7, 8}


def test_all_live_prompts_are_returned_if_more_are_requested_than_exist() -> None:
    assert sorted(typical(moved(live=4), 4, 9)) == [0, 1, 2, 3]
