"""Tests stochastic rounding to bf16: a number becomes one of its neighbours, and on average itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.rounding import neighbours, round_to_bfloat16

LARGEST = float(torch.finfo(torch.bfloat16).max)
NUMBERS = st.floats(-LARGEST, LARGEST, width=32)


def rounded(weights: torch.Tensor) -> torch.Tensor:
    parameter = torch.nn.Parameter(weights.clone())
    round_to_bfloat16([parameter])
    return parameter.detach()


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_stochastic_rounding_yields_an_adjacent_bf16_value(numbers: list[float]) -> None:
    weights = torch.tensor(numbers)
    lower, upper = neighbours(weights)
    result = rounded(weights).float()
    assert ((result == lower) | (result == upper)).all()
    assert (lower.abs() <= weights.abs()).all()
    assert (weights.abs() < upper.abs()).all()


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_value_representable_in_bf16_is_unchanged_by_rounding(numbers: list[float]) -> None:
    weights = torch.tensor(numbers).bfloat16()
    assert torch.equal(rounded(weights.float()), weights)


@pytest.mark.parametrize("number", [1 + 1e-4, -1 - 1e-4, 3.1e-5, -0.0123])
def test_stochastic_rounding_is_unbiased(number: float) -> None:
    weights = torch.full((200, 1000), number)
    lower, upper = neighbours(weights[0, :1])
    spread = float((upper - lower).abs()) / 2 / 200_000**0.5
    assert float(rounded(weights).double().mean()) == pytest.approx(float(weights[0, 0]), abs=5 * spread)


def test_stochastic_rounding_is_deterministic_for_equal_weights() -> None:
    weights = torch.randn(1000)
    assert torch.equal(rounded(weights), rounded(weights))


def test_parameters_with_equal_values_are_rounded_independently() -> None:
    """Identical rounding of equal parameters would add up errors over the layers."""
    first, second = (torch.nn.Parameter(torch.full((1000,), 1 + 2e-3)) for _ in range(2))
    round_to_bfloat16([first, second])
    assert 0.3 < float((first == second).float().mean()) < 0.7


def test_float16_weight_is_not_rounded() -> None:
    weights = torch.randn(10).half()
    assert rounded(weights).dtype is torch.float16
