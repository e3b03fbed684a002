"""Tests that a loss must be proven to be within the margin, or to exceed it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.evaluation.intervals import Interval, share_difference
from svc.evaluation.verdict import Gate, GateOutcome, GateReport, verdict_of

MARGINS = st.floats(0, 1)


@st.composite
def changed(draw: st.DrawFn, most: int = 300) -> tuple[int, int, int]:
    """Draw the number of lost answers, of gained answers and of examples."""
    examples = draw(st.integers(1, most))
    lost = draw(st.integers(0, examples))
    return lost, draw(st.integers(0, examples - lost)), examples


def loss_of(lost: int, gained: int, examples: int) -> Interval:
    return share_difference([1.0] * lost + [-1.0] * gained + [0.0] * (examples - lost - gained))


def outcome(lost: int, gained: int, examples: int, margin: float) -> GateOutcome:
    return verdict_of(loss_of(lost, gained, examples), margin, examples).outcome


@given(changed())
def test_confidence_interval_of_a_quality_loss_contains_the_measured_loss(counts: tuple[int, int, int]) -> None:
    loss = loss_of(*counts)
    assert -1 <= loss.low <= loss.value <= loss.high <= 1
    assert loss.low < loss.high


@given(changed())
def test_confidence_interval_of_a_quality_loss_is_mirrored_when_the_models_are_swapped(
    counts: tuple[int, int, int],
) -> None:
    lost, gained, examples = counts
    loss, other = loss_of(*counts), loss_of(gained, lost, examples)
    assert (loss.low, loss.high) == pytest.approx((-other.high, -other.low))


@pytest.mark.parametrize(("lost", "leaves_out_0"), [(5, False), (6, True)])
@pytest.mark.parametrize("examples", [60, 1000])
def test_six_newly_wrong_answers_prove_a_quality_loss_but_five_do_not(
    lost: int, leaves_out_0: bool, examples: int
) -> None:
    assert (loss_of(lost, 0, examples).low > 0) is leaves_out_0


@pytest.mark.parametrize("true_loss", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("examples", [30, 60, 200])
def test_version_worse_by_more_than_the_margin_passes_the_gate_in_at_most_10_percent_of_trials(
    true_loss: float, examples: int
) -> None:
    """The margin equals the true loss, which is excluded by chance nominally once in forty times."""
    lost = np.random.default_rng(0).binomial(examples, true_loss, 2000)
    seen, counts = np.unique(lost, return_counts=True)
    passed = sum(
        count
        for hits, count in zip(seen, counts, strict=True)
        if outcome(int(hits), 0, examples, true_loss - 1e-6) is GateOutcome.PASSED
    )
    assert passed / 2000 <= 0.1


@given(changed(), MARGINS, MARGINS)
def test_wider_margin_never_worsens_the_outcome(counts: tuple[int, int, int], margin: float, other: float) -> None:
    order = [GateOutcome.FAILED, GateOutcome.UNDECIDED, GateOutcome.PASSED]
    narrow, wide = (order.index(outcome(*counts, limit)) for limit in sorted((margin, other)))
    assert narrow <= wide


@given(changed(), st.integers(2, 20), MARGINS)
def test_gate_decision_does_not_change_with_more_examples_in_the_same_proportions(
    counts: tuple[int, int, int], times: int, margin: float
) -> None:
    lost, gained, examples = counts
    few = outcome(*counts, margin)
    many = outcome(lost * times, gained * times, examples * times, margin)
    assert many is few or few is GateOutcome.UNDECIDED


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_smallest_detectable_quality_loss_decreases_with_more_examples_when_no_answer_changes(
    examples: int, more: int
) -> None:
    few, many = (verdict_of(loss_of(0, 0, count), 0.1, count) for count in (examples, examples + more))
    assert many.detectable < few.detectable
    assert many.loss.high < few.loss.high


@given(changed(), MARGINS)
def test_gate_cannot_both_pass_and_fail(counts: tuple[int, int, int], margin: float) -> None:
    loss = loss_of(*counts)
    verdict = verdict_of(loss, margin, counts[2])
    assert (verdict.outcome is GateOutcome.PASSED) == (loss.high <= margin + 1e-9)
    assert (verdict.outcome is GateOutcome.FAILED) == (loss.low > margin + 1e-9)


@given(changed(), MARGINS)
def test_undecided_gate_states_how_many_examples_suffice_to_decide(counts: tuple[int, int, int], margin: float) -> None:
    verdict = verdict_of(loss_of(*counts), margin, counts[2])
    needed = verdict.examples_to_decide
    if verdict.outcome is not GateOutcome.UNDECIDED:
        assert needed is None
        return
    if needed is None:
        assert verdict.loss.value == pytest.approx(margin, abs=1e-2)  # otherwise more than a million would be needed
        return
    assert needed > counts[2]
    if needed < 10**6:
        half = (verdict.loss.high - verdict.loss.low) / 2 * (counts[2] / needed) ** 0.5
        wider = Interval(value=verdict.loss.value, low=verdict.loss.value - half, high=verdict.loss.value + half)
        assert verdict_of(wider, margin, needed).outcome is not GateOutcome.UNDECIDED


def test_gate_with_a_10_percent_margin_is_undecided_when_12_of_60_answers_become_wrong() -> None:
    assert outcome(12, 0, 60, 0.1) is GateOutcome.UNDECIDED


def test_gate_with_a_5_percent_margin_is_undecided_when_4_of_30_answers_become_wrong() -> None:
    assert outcome(4, 0, 30, 0.05) is GateOutcome.UNDECIDED


def test_gate_with_a_5_percent_margin_is_undecided_when_10_of_200_answers_become_wrong_and_4_become_correct() -> None:
    assert outcome(10, 4, 200, 0.05) is GateOutcome.UNDECIDED


@pytest.mark.parametrize(
    ("examples", "wanted"), [(30, GateOutcome.UNDECIDED), (60, GateOutcome.PASSED), (2, GateOutcome.UNDECIDED)]
)
def test_gate_passes_unchanged_answers_only_with_enough_examples(examples: int, wanted: GateOutcome) -> None:
    assert outcome(0, 0, examples, 0.05) is wanted


def test_gate_with_a_margin_of_100_percent_always_passes() -> None:
    assert outcome(2, 0, 2, 1.0) is GateOutcome.PASSED


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gate_is_undecided_with_fewer_examples_than_required(value: float) -> None:
    narrow = Interval(value=value, low=value, high=value)
    verdict = verdict_of(narrow, 0.5, 7, fewest=8)
    assert (verdict.outcome, verdict.examples_to_decide) == (GateOutcome.UNDECIDED, 8)
    said = str(GateReport(gate=Gate.GPTQ_NLL, measured="GPTQ", limit="evaluate.max_gptq_nll", verdict=verdict))
    assert said.endswith("undecided: 7 examples are too few; about 8 would decide")
    assert verdict_of(narrow, 0.5, 8, fewest=8).outcome is not GateOutcome.UNDECIDED


def test_number_of_examples_needed_to_decide_is_omitted_when_the_loss_equals_the_margin() -> None:
    verdict = verdict_of(Interval(value=0.1, low=0.0, high=0.2), 0.1, 60)
    assert (verdict.outcome, verdict.examples_to_decide) == (GateOutcome.UNDECIDED, None)


def report(loss: Interval, margin: float, gate: Gate = Gate.FORGETTING) -> str:
    return str(GateReport(gate=gate, measured="lost", limit=f"evaluate.{gate}", verdict=verdict_of(loss, margin, 60)))


def test_undecided_gate_message_names_the_possible_loss_and_the_number_of_examples_needed() -> None:
    assert report(Interval(value=0.01, low=-0.07, high=0.09), 0.05) == (
        "lost, loss 0.010 [-0.070, 0.090], at most 0.050 (evaluate.max_forgetting): undecided: "
        "a loss of up to 0.090 cannot be excluded with 60 questions; about 500 would decide"
    )


def test_message_of_a_decided_gate_states_how_large_a_loss_is_ruled_out_or_proven() -> None:
    assert "at most 0.100 (evaluate.max_gptq_loss): passed: a larger loss is excluded with 60 examples" in report(
        Interval(value=0.0, low=-0.05, high=0.05), 0.1, Gate.GPTQ_LOSS
    )
    assert "failed: a loss of 0.150 or more is proven with 60 questions" in report(
        Interval(value=0.2, low=0.15, high=0.25), 0.1
    )
