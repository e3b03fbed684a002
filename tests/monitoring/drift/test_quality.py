"""Tests that held-out quality counts as changed only if it differs by more than rounding."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitoring.drift.quality import Figures, Quality, QualityReport, compare_quality, read_quality
from svc.registry.registry import Registry
from svc.store.holdouts import HoldoutOutcome, add_holdout_run
from tests.builders.holdout_runs import NOW, run
from tests.monitoring.drift.traffic import open_registry, register, target
from tests.new_store import new_store
from tests.serving.versions import OTHER_FACTS

pytestmark = pytest.mark.slow


def figures(nll: Sequence[float], hits: Sequence[bool], weight: Sequence[float] = ()) -> dict[int, Figures]:
    columns = zip(nll, hits, weight or [1.0] * len(nll), map(float, hits), strict=True)
    return {place: Figures(*column) for place, column in enumerate(columns)}


def quality(change: Sequence[float], hits: Sequence[bool], hits_now: Sequence[bool]) -> Quality:
    before = [1.0] * len(change)
    now = [value + 1.0 for value in change]
    return compare_quality(figures(before, hits), run(now, hits_now)).quality


HITS = [place % 4 > 0 for place in range(200)]


def test_quality_is_reported_as_unchanged_if_results_equal_those_at_registration() -> None:
    report = compare_quality(figures([0.2, 0.4], [True, False]), run([0.2, 0.4], [True, False]))
    assert report.quality is Quality.AS_REGISTERED
    assert [report.nll, report.registered_nll] == pytest.approx([0.3, 0.3])
    assert (report.nll_p, report.exact_match_p) == (1.0, 1.0)


def test_current_and_registered_nll_are_both_weighted_by_token_count() -> None:
    report = compare_quality(figures([0.2, 0.4], [True, False], weight=[3, 1]), run([0.2, 0.8], [True, False]))
    assert [report.nll, report.registered_nll] == pytest.approx([0.35, 0.25])


def test_rounding_errors_are_not_a_quality_change() -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, 200)
    assert quality(noise.tolist(), HITS, HITS) is Quality.AS_REGISTERED


@pytest.mark.parametrize("change", [0.5, -0.5])
def test_quality_is_reported_as_changed_if_likelihoods_differ_in_either_direction(change: float) -> None:
    assert quality([change] * 200, HITS, HITS) is Quality.CHANGED


def test_quality_is_reported_as_changed_even_if_only_a_few_examples_differ() -> None:
    assert quality([3.0] * 10 + [0.0] * 190, HITS, HITS) is Quality.CHANGED


def test_quality_is_reported_as_changed_if_results_of_a_small_held_out_set_differ() -> None:
    assert quality([1.0] * 8, HITS[:8], HITS[:8]) is Quality.CHANGED


def test_quality_is_reported_as_unchanged_if_a_statistically_significant_difference_is_small() -> None:
    assert quality([0.015] * 200, HITS, HITS) is Quality.AS_REGISTERED


def test_quality_is_reported_as_changed_if_correct_answers_become_wrong() -> None:
    lost = [hit and place > 40 for place, hit in enumerate(HITS)]
    assert quality([0.0] * 200, HITS, lost) is Quality.CHANGED


def test_quality_is_reported_as_unchanged_if_few_answers_change_between_right_and_wrong() -> None:
    swapped = [not hit if place < 6 else hit for place, hit in enumerate(HITS)]
    assert quality([0.0] * 200, HITS, swapped) is Quality.AS_REGISTERED


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = open_registry(tmp_path)
    register(registry)
    return registry


def test_quality_is_judged_by_the_newest_completed_held_out_evaluation(registry: Registry, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    registered = registry.results(target().version, target().format)
    good = run([one.nll for one in registered], [one.hit for one in registered])
    add_holdout_run(store, replace(good, nll=tuple(value + 1 for value in good.nll)))
    assert read_quality(registry, store, target()).quality is Quality.CHANGED
    add_holdout_run(store, good)
    add_holdout_run(
        store, replace(good, outcome=HoldoutOutcome.FAILED, reason="away", places=(), nll=(), hits=(), scores=())
    )
    report = read_quality(registry, store, target())
    assert report.quality is Quality.AS_REGISTERED
    assert report.examples == 200
    assert report.asked_at == NOW


def test_quality_is_reported_as_unknown_without_a_held_out_evaluation(registry: Registry, tmp_path: Path) -> None:
    report = read_quality(registry, new_store(tmp_path), target())
    assert report.quality is Quality.UNKNOWN
    assert "no held-out evaluation" in report.why


def test_quality_status_is_unknown_if_the_version_has_no_registered_answers(registry: Registry, tmp_path: Path) -> None:
    register(registry, 2, space=False)
    report = read_quality(registry, new_store(tmp_path), target(2))
    assert report.quality is Quality.UNKNOWN
    assert "triage@2 has no" in report.why


def test_only_examples_in_the_held_out_evaluation_are_compared() -> None:
    picked = replace(run([1.0, 1.0], [True, True]), places=(0, 2))
    report = compare_quality(figures([1.0, 9.0, 1.0], [True, False, True]), picked)
    assert (report.quality, report.examples, report.registered_nll) == (Quality.AS_REGISTERED, 2, 1.0)


def test_later_held_out_evaluations_are_compared_with_the_first_if_the_engine_kind_has_changed_since_registration(
    registry: Registry, tmp_path: Path
) -> None:
    store = new_store(tmp_path)
    registered = registry.results(target().version, target().format)
    first = run([one.nll + 0.3 for one in registered], [one.hit for one in registered], OTHER_FACTS)
    add_holdout_run(store, first)
    report = read_quality(registry, store, target())
    assert (report.quality, "later runs" in report.why) == (Quality.UNKNOWN, True)
    add_holdout_run(store, first)
    assert read_quality(registry, store, target()).quality is Quality.AS_REGISTERED
    add_holdout_run(store, replace(first, nll=tuple(value + 1 for value in first.nll)))
    assert read_quality(registry, store, target()).quality is Quality.CHANGED


def test_held_out_evaluations_with_different_metrics_are_compared_by_exact_match(
    registry: Registry, tmp_path: Path
) -> None:
    store = new_store(tmp_path)
    registered = registry.results(target().version, target().format)
    by_match = run([one.nll for one in registered], [one.hit for one in registered], OTHER_FACTS)
    add_holdout_run(store, replace(by_match, metric="rouge_l", scores=(0.3,) * len(registered)))
    add_holdout_run(store, by_match)
    report = read_quality(registry, store, target())
    assert report.quality is Quality.AS_REGISTERED, report.why


def by_rouge(before: Sequence[float], now: Sequence[float]) -> QualityReport:
    """Return a report on free-text answers, none of which equals its reference, with all likelihoods unchanged."""
    misses = [False] * len(before)
    registered = {
        place: one._replace(score=before[place]) for place, one in figures([1.0] * len(before), misses).items()
    }
    ran = run([1.0] * len(now), misses)
    return compare_quality(registered, replace(ran, metric="rouge_l", scores=tuple(now)))


def test_quality_is_reported_as_changed_if_answers_are_worse_despite_equal_exact_match() -> None:
    before = [0.3 + place / 1000 for place in range(200)]
    report = by_rouge(before, [score - 0.2 if place % 4 == 0 else score for place, score in enumerate(before)])
    assert (report.quality, report.metric) == (Quality.CHANGED, "rouge_l")
    assert report.registered_score - report.score == pytest.approx(0.05)
    assert report.exact_match_p == 1.0


def test_quality_is_reported_as_unchanged_if_improved_and_degraded_answers_balance() -> None:
    before = [0.5] * 200
    noise = np.random.default_rng(0).normal(0, 0.2, 60).tolist()
    assert by_rouge(before, [0.5 + one for one in noise] + before[60:]).quality is Quality.AS_REGISTERED


def test_identical_answers_have_a_quality_p_value_of_1() -> None:
    report = by_rouge([0.3] * 200, [0.3] * 200)
    assert (report.quality, report.score_p) == (Quality.AS_REGISTERED, 1.0)


def test_false_alarm_rate_of_the_quality_test_is_within_its_significance_level() -> None:
    """Uses a level of 0.05, which needs few runs. For ten changes, all combinations are counted."""
    generator = np.random.default_rng(1)
    found = [by_rouge([0.0] * 10, generator.normal(0, 1, 10).tolist()).score_p <= 0.05 for _ in range(300)]
    assert 0.02 < np.mean(found) < 0.09


@pytest.mark.parametrize("changed", [16, 17, 200])
def test_quality_is_reported_as_changed_if_as_few_as_16_answers_become_worse(changed: int) -> None:
    worse = [-0.1 - place / 1000 for place in range(changed)]
    assert by_rouge([0.0] * changed, worse).quality is Quality.CHANGED
