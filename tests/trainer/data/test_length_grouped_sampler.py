"""Tests that the order of examples depends only on the seed and the epoch."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.length_grouped_sampler import LengthGroupedSampler


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 2**31), st.integers(0, 9)
)
def test_length_grouped_sampler_draws_every_example_once_per_epoch(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    order = LengthGroupedSampler(lengths, batch, seed)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 9))
def test_batches_are_cut_from_length_sorted_windows_and_shuffled(lengths: list[int], batch: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch, 3)
    sampler.set_epoch(epoch)
    mixed = np.random.SeedSequence([3, epoch]).generate_state(1)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    window = max(1, min(50, len(lengths) // (2 * batch)))
    batches: list[torch.Tensor] = []
    for drawn in torch.randperm(len(lengths), generator=generator).split(window * batch):
        batches += drawn[torch.tensor(lengths)[drawn].argsort(descending=True, stable=True)].split(batch)
    full = len(lengths) // batch
    order = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(batches))]
    assert list(sampler) == [index for number in order for index in batches[number].tolist()]


def test_sampling_order_is_independent_of_the_global_random_state() -> None:
    order = LengthGroupedSampler(range(1, 50), 4, 7)
    first = list(order)
    torch.rand(5)
    before = torch.get_rng_state()
    assert list(order) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_order_differs_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(range(1, 50), 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(st.integers(0, 2**31))
def test_padding_is_small_even_with_few_batches(seed: int) -> None:
    """There are six batches. In a random order, a third of the tokens would be padding."""
    lengths = list(range(100, 196))
    order = [lengths[index] for index in LengthGroupedSampler(lengths, 16, seed)]
    padded = sum(16 * max(order[start : start + 16]) for start in range(0, 96, 16))
    assert padded / sum(lengths) < 1.15


def test_short_and_long_batches_are_interleaved() -> None:
    """There are 200 long and 200 short examples. If sorted, the first half of the steps would be all long ones."""
    lengths = [100] * 200 + [10] * 200
    for seed in range(20):
        order = [lengths[index] for index in LengthGroupedSampler(lengths, 10, seed)]
        batches = [sum(order[start : start + 10]) for start in range(0, 400, 10)]
        changes = sum(before != after for before, after in pairwise(batches))
        assert changes >= 10  # 20 are expected in a random order; one in a sorted one


def test_only_the_last_batch_of_an_epoch_is_partial() -> None:
    """Otherwise, later batches would contain examples from two length groups."""
    lengths = [100] * 48 + [10] * 49
    for seed in range(20):
        order = [lengths[index] for index in LengthGroupedSampler(lengths, 16, seed)]
        mixed = sum(len(set(order[start : start + 16])) > 1 for start in range(0, 97, 16))
        assert mixed <= 2  # one in each of the two windows that are sorted


def test_batches_contain_examples_of_similar_length() -> None:
    lengths = [100 if number % 2 else 10 for number in range(64)]
    order = list(LengthGroupedSampler(lengths, 4, 0))
    mixed = sum(len({lengths[index] for index in order[start : start + 4]}) > 1 for start in range(0, 64, 4))
    assert mixed <= 4
