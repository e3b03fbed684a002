"""Tests that devices divide each step of one device among them, without losing or repeating an example."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.device_batches import DeviceBatches
from trainer.data.length_grouped_sampler import LengthGroupedSampler


def batches_of(
    lengths: list[int], batch: int, accumulation: int, devices: int, epoch: int = 0
) -> tuple[list[int], list[list[list[int]]]]:
    """Return the order of one device, and the batches of each of several. A filler is announced if one is used."""
    step = batch * accumulation * devices
    shares = []
    order = LengthGroupedSampler(lengths, step, 0)
    order.set_epoch(epoch)
    for rank in range(devices):
        share = DeviceBatches(LengthGroupedSampler(lengths, step, 0), step, batch, rank, devices)
        share.set_epoch(epoch)
        shares.append(list(share))
        assert len(share) == len(shares[-1])
        needs_filler = share.needs_filler
    assert needs_filler == any(len(lengths) in each for share in shares for each in share)
    return list(order), shares


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 4),
    st.integers(0, 3),
)
def test_each_example_of_a_step_is_assigned_to_exactly_one_device(
    lengths: list[int], batch: int, accumulation: int, devices: int, epoch: int
) -> None:
    order, shares = batches_of(lengths, batch, accumulation, devices, epoch)
    assert len({len(share) for share in shares}) == 1
    step, filler = batch * accumulation * devices, len(lengths)
    for number, start in enumerate(range(0, len(order), step)):
        of_step = [share[number * accumulation : (number + 1) * accumulation] for share in shares]
        indices = [index for share in of_step for each in share for index in each if index != filler]
        assert sorted(indices) == sorted(order[start : start + step])
        assert all(1 <= len(each) <= batch for share in of_step for each in share)


def test_filler_examples_are_used_only_when_the_last_step_has_too_few_examples() -> None:
    _, shares = batches_of([5] * 9, 2, 1, 4)
    assert [share[-1] == [9] for share in shares] == [False, True, True, True]
    _, shares = batches_of([5] * 12, 2, 1, 4)
    assert all(index < 12 for share in shares for each in share for index in each)


def test_devices_get_batches_of_similar_length() -> None:
    lengths = [1, 2, 3, 4, 100, 101, 102, 103]
    _, (first, second) = batches_of(lengths, 2, 2, 2)
    assert [sorted(lengths[index] for index in each) for each in first] == [[102, 103], [3, 4]]
    assert [sorted(lengths[index] for index in each) for each in second] == [[100, 101], [1, 2]]
