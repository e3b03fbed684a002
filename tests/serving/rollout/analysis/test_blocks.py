"""Blocks contain both arms, and every unit belongs to one block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.rollout.analysis.comparisons import Block, Blocks
from serving.rollout.analysis.units import Arm


@given(st.lists(st.tuples(st.sampled_from(Arm), st.floats(0, 1))))
def test_observation_blocks_are_minimal_and_preserve_the_order_within_each_version(
    observations: list[tuple[Arm, float]],
) -> None:
    blocks, complete = Blocks(), list[Block]()
    for arm, value in observations:
        if block := blocks.add(arm, value):
            complete.append(block)
    for block in complete:
        assert min(len(block.production), len(block.candidate)) == 1
        assert -1 <= block.difference <= 1
    used = sum(len(block.production) + len(block.candidate) for block in complete)
    assert len({arm for arm, _ in observations[used:]}) <= 1
    for arm in Arm:
        values = [value for block in complete for value in getattr(block, arm.value)]
        assert values == [value for of, value in observations[:used] if of is arm]


def test_block_difference_is_the_difference_between_the_means_of_the_arms() -> None:
    block = Block(production=[0.0, 0.0, 1.0, 0.0], candidate=[1.0])
    assert block.difference == pytest.approx(0.75)
