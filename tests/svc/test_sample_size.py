"""Tests the number of examples needed to detect a loss, using simulated versions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.sample_size import ASSUMED_CHANGED, Z_INTERVAL, about, detectable_loss, examples_needed, say_detectable

LOSSES = st.floats(0.001, 1)
VARIANCES = st.floats(0.0001, 1)


@given(st.integers(1, 10**6), VARIANCES)
def test_smallest_detectable_quality_loss_decreases_with_the_number_of_examples(examples: int, variance: float) -> None:
    assert detectable_loss(examples + 1, variance) < detectable_loss(examples, variance)


@given(LOSSES, VARIANCES)
def test_required_number_of_examples_is_the_minimum_that_detects_the_quality_loss(loss: float, variance: float) -> None:
    needed = examples_needed(loss, variance)
    assert detectable_loss(needed, variance) <= loss * (1 + 1e-9)
    assert needed == 1 or detectable_loss(needed - 1, variance) > loss * (1 - 1e-9)


def test_smallest_detectable_quality_loss_is_detected_in_80_percent_of_simulated_samples() -> None:
    examples = 400
    loss = detectable_loss(examples)
    lost, gained = (ASSUMED_CHANGED + loss) / 2, (ASSUMED_CHANGED - loss) / 2
    counts = np.random.default_rng(0).multinomial(examples, [lost, gained, 1 - lost - gained], 4000)
    means = (counts[:, 0] - counts[:, 1]) / examples
    deviations = np.sqrt(((counts[:, 0] + counts[:, 1]) / examples - means**2) / examples)
    assert float((means - Z_INTERVAL * deviations > 0).mean()) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("examples", "said"), [(7, "7"), (60, "60"), (232, "240"), (240, "240"), (1535, "1,600"), (995, "1,000")]
)
def test_required_number_of_examples_is_rounded_up_to_two_significant_digits(examples: int, said: str) -> None:
    assert about(examples) == said


def test_smallest_detectable_quality_loss_is_printed_with_the_assumed_share_of_changed_answers() -> None:
    assert say_detectable(200) == (
        "200 held-out examples are enough to detect, with 80% power, a loss that differs from its limit by at least "
        "0.063, assuming that 10% of the answers change"
    )
