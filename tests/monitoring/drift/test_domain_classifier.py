"""Tests that sets learned from earlier items are bet on only with later items, never with the same ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from monitoring.drift.bets import SLACK, SURE, upper_limit
from monitoring.drift.domain_classifier import HISTORY, LEARNED_FROM, DomainClassifier, Similarities
from monitoring.drift.evidence import HIT, MISS, NOT_THERE, Hits
from svc.drift_reference.sample import Floats, Sample
from tests.monitoring.drift.synthetic_requests import draw_requests

REFERENCE = draw_requests(1, 200).prompts
CLASSIFIER = DomainClassifier(REFERENCE)
SIZE = 600
ALIKE = draw_requests(2, SIZE).prompts
FIRST_LEARNED = min(LEARNED_FROM) + 50
"""Position of the first item on which a learned set is bet."""
ALL_LEARNED = max(LEARNED_FROM) + 50


def compare(items: Sample, classifier: DomainClassifier = CLASSIFIER) -> Similarities:
    return Similarities(classifier.similar(items, items), classifier.similar(items))


def copy(similar: Similarities) -> Similarities:
    return Similarities(similar.among.copy(), similar.reference.copy())


def redraw(similar: Similarities, place: int, seed: int) -> None:
    """Give an item new random similarities."""
    chance = np.random.default_rng(seed)
    among = chance.random(len(similar.among)).astype(np.float32)
    similar.among[place] = similar.among[:, place] = among
    similar.reference[place] = chance.random(similar.reference.shape[1]).astype(np.float32)


SIMILAR = compare(ALIKE)


def learned(similar: Similarities, places: range, dependence: float = 1.0) -> tuple[NDArray[np.bool_], Floats]:
    """Return the hits and bounds of the items, with shape (items x bets)."""
    results = [CLASSIFIER.learned_hits(similar, place, dependence) for place in places]
    return np.array([hits == HIT for hits, _ in results]), np.array([bounds for _, bounds in results])


def is_bet_on(hits: Hits) -> list[bool]:
    return [bool(hit != NOT_THERE) for hit in hits]


@pytest.mark.parametrize("dependence", [1.0, 5.0, 64.0])
def test_classifier_places_bets_only_after_enough_earlier_items(dependence: float) -> None:
    later = round(dependence) - 1
    counts = [
        sum(is_bet_on(CLASSIFIER.learned_hits(SIMILAR, place + later, dependence)[0]))
        for place in (0, FIRST_LEARNED - 1, FIRST_LEARNED, ALL_LEARNED - 1, ALL_LEARNED)
    ]
    half, everything = CLASSIFIER.learned // 2, CLASSIFIER.learned
    assert counts == [0, 0, half, half, everything]


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(ALL_LEARNED + 65, SIZE - 1), st.integers(1, 65), st.data())
def test_classifier_results_do_not_depend_on_items_within_the_dependence_distance(
    place: int, dependence: int, data: st.DataObject
) -> None:
    hits, bounds = CLASSIFIER.learned_hits(SIMILAR, place, float(dependence))
    changed = copy(SIMILAR)
    for near in data.draw(st.sets(st.integers(place - dependence + 1, SIZE - 1))) - {place}:
        redraw(changed, near, seed=near)
    other_hits, other_bounds = CLASSIFIER.learned_hits(changed, place, float(dependence))
    assert other_hits.tolist() == hits.tolist()
    assert other_bounds.tolist() == bounds.tolist()


@pytest.mark.parametrize("dependence", [1.0, 5.0])
def test_classifier_thresholds_and_bounds_do_not_depend_on_the_item_being_checked(dependence: float) -> None:
    place, expected = 500, CLASSIFIER.learned_hits(SIMILAR, 500, dependence)[1]
    results = []
    for score in np.linspace(-1, 1, 41):
        changed = copy(SIMILAR)
        changed.among[place] = score
        changed.reference[place] = 0.0
        hits, bounds = CLASSIFIER.learned_hits(changed, place, dependence)
        assert bounds.tolist() == expected.tolist()
        results.append(hits == HIT)
    # Each set has one limit: no score above it misses, and none below it hits.
    assert all((np.diff(hits.astype(int)) >= 0).all() and hits[-1] and not hits[0] for hits in np.array(results).T)


@pytest.mark.parametrize("dependence", [1, 5])
def test_changing_the_nearest_item_outside_the_dependence_distance_usually_changes_classifier_results(
    dependence: int,
) -> None:
    """Control: shows that the classifier does react to older items."""
    changes = 0
    for place in range(500, 540):
        changed = copy(SIMILAR)
        redraw(changed, place - dependence, seed=place)
        hits, bounds = CLASSIFIER.learned_hits(SIMILAR, place, float(dependence))
        other_hits, other_bounds = CLASSIFIER.learned_hits(changed, place, float(dependence))
        changes += (hits.tolist(), bounds.tolist()) != (other_hits.tolist(), other_bounds.tolist())
    assert changes > 20


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(0, 1_000), st.integers(0, 120), st.sampled_from([1.0, 7.4, 65.0]))
def test_hit_rate_bounds_below_100_percent_are_above_0_and_at_most_95_percent(
    seed: int, back: int, dependence: float
) -> None:
    chance = np.random.default_rng(seed)
    similar = Similarities(
        chance.random((300, 300)).astype(np.float32), (chance.random((300, 200)) ** 3).astype(np.float32)
    )
    _, bounds = CLASSIFIER.learned_hits(similar, 299 - back, dependence)
    there = bounds[bounds < 1]
    assert ((there > 0) & (there <= 0.95)).all()


@pytest.mark.slow
def test_classifier_hit_rates_stay_below_their_bounds_if_there_is_no_drift() -> None:
    hits, bounds = learned(SIMILAR, range(ALL_LEARNED, SIZE))
    assert (hits.mean(axis=0) < bounds.mean(axis=0)).all()


def test_some_classifier_hit_rates_exceed_their_bounds_after_a_topic_change() -> None:
    moved = ALIKE.part(0, 300).followed_by(draw_requests(3, 60, moved=1.0).prompts)
    hits, bounds = learned(compare(moved), range(320, 330))
    assert (hits[:, :4].mean(axis=0) > bounds[:, :4].mean(axis=0)).all()


def test_bound_for_sudden_changes_rises_if_half_of_the_recent_prompts_differ_from_the_reference() -> None:
    """Long after a change, the share in the reference differs from the recent share."""
    half_moved = draw_requests(3, 250, moved=2.0).prompts.followed_by(draw_requests(4, 250).prompts)
    mixed = half_moved.at(np.random.default_rng(1).permutation(500))
    bounds = learned(compare(mixed), range(480, 500))[1]
    plain = learned(SIMILAR, range(480, 500))[1]
    assert bounds[:, 1::2].mean() > plain[:, 1::2].mean() + 0.05


def test_domain_classifier_does_not_learn_from_items_outside_its_history_window() -> None:
    place = SIZE - 1
    changed = copy(SIMILAR)
    for old in range(place - max(LEARNED_FROM) - HISTORY):
        redraw(changed, old, seed=old)
    before, after = (CLASSIFIER.learned_hits(similar, place, 1.0) for similar in (SIMILAR, changed))
    assert (before[0].tolist(), before[1].tolist()) == (after[0].tolist(), after[1].tolist())


def test_prompts_far_from_the_reference_are_below_all_similarity_limits() -> None:
    far = draw_requests(2, 20, moved=30.0).prompts
    hits = CLASSIFIER.far_hits(CLASSIFIER.similar(far))
    assert hits.shape == (20, len(CLASSIFIER.far_bounds))
    assert (hits == HIT).all()


@pytest.mark.slow
def test_shares_of_dissimilar_prompts_stay_below_their_bounds_if_traffic_resembles_the_reference() -> None:
    classifiers = [DomainClassifier(draw_requests(seed, 100).prompts) for seed in range(10, 30)]
    hits = [classifier.far_hits(classifier.similar(ALIKE)) == HIT for classifier in classifiers]
    assert (np.mean(hits, axis=(0, 1)) < np.mean([one.far_bounds for one in classifiers], axis=0)).all()


def test_bound_for_dissimilar_prompts_is_twice_the_upper_confidence_limit_of_their_share_in_the_reference() -> None:
    expected = [SLACK * upper_limit(count, 200, SURE) for count in (0, 0, 4, 4, 20, 20)]
    assert CLASSIFIER.far_bounds == pytest.approx(expected)


@pytest.mark.slow
def test_changed_prompts_are_distinguished_from_the_reference_and_rank_as_most_typical_of_live_traffic() -> None:
    live = ALIKE.part(0, 40).followed_by(draw_requests(3, 60, moved=3.0).prompts)
    assert CLASSIFIER.separation(ALIKE.part(0, 100)) < 0.65 < CLASSIFIER.separation(live)
    assert all(place >= 40 for place in CLASSIFIER.most_typical(live, 5))


def test_no_prompt_of_a_tiny_reference_is_below_any_similarity_limit() -> None:
    for size in (1, 2, 3, 4):
        reference = REFERENCE.part(0, size)
        classifier = DomainClassifier(reference)
        assert np.isfinite(classifier.far_bounds).all(), size
        assert (classifier.far_hits(classifier.similar(reference)) == MISS).all(), size
        hits, bounds = classifier.learned_hits(compare(ALIKE.part(0, 200), classifier), 199, 1.0)
        assert hits.shape == bounds.shape == (classifier.learned,), size


@pytest.mark.parametrize("view", [np.zeros((200, 0)), np.zeros((200, 3)), np.full((200, 2), 0.1)])
def test_constant_or_empty_text_vectors_produce_no_classifier_hits(view: Floats) -> None:
    flat = Sample(200, views=(view, np.zeros((200, 0))))
    classifier = DomainClassifier(flat)
    similar = compare(flat, classifier)
    assert (classifier.far_hits(similar.reference) == MISS).all()
    assert (classifier.learned_hits(similar, 199, 1.0)[0] == MISS).all()


def test_empty_sample_yields_an_empty_table_of_prompts_far_from_the_reference() -> None:
    nothing = REFERENCE.part(0, 0)
    assert CLASSIFIER.far_hits(CLASSIFIER.similar(nothing)).shape == (0, len(CLASSIFIER.far_bounds))
