"""Divides the examples of each optimizer step among devices, so that each step trains on the same examples as it would
on a single device.

If the last step of an epoch is not full, transformers' own sharding fills it with examples from the start of the epoch.
Imports torch.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from torch.utils.data import Sampler

from trainer.data.length_grouped_sampler import LengthGroupedSampler


class DeviceBatches(Sampler[list[int]]):
    """Yields the batches of one device, as lists of example indices.

    Every device gets the same number of batches in a step, because the devices wait for each other. If an epoch's last
    step has too few examples, some batches contain only a filler, whose index is the number of examples.

    Args:
        order: order of the examples, the same on every device.
        step: number of examples per optimizer step, on all devices together.
        batch_size: maximum number of examples in a batch.
        rank: index of this device, starting at 0.
        devices: number of devices.
    """

    def __init__(self, order: LengthGroupedSampler, step: int, batch_size: int, rank: int, devices: int) -> None:
        self.batch_sampler = order  # transformers sets the epoch of the attribute with this name
        self._step = step
        self._batch_size = batch_size
        self._rank = rank
        self._devices = devices

    @property
    def needs_filler(self) -> bool:
        """Whether an epoch's last step has too few examples for every batch on every device to contain one."""
        rest = len(self.batch_sampler) % self._step
        return rest < self._batches(rest) * self._devices

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the order depends."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.batch_sampler), self._step)
        return full * self._batches(self._step) + (self._batches(rest) if rest else 0)

    def __iter__(self) -> Iterator[list[int]]:
        count, order = len(self.batch_sampler), iter(self.batch_sampler)
        steps = iter(lambda: list(islice(order, self._step)), [])
        return chain.from_iterable(self._share(step, filler=count) for step in steps)

    def _batches(self, examples: int) -> int:
        """Return the number of batches per device in a step with the given number of examples."""
        return math.ceil(examples / (self._batch_size * self._devices))

    def _share(self, step: Sequence[int], filler: int) -> list[list[int]]:
        """Return this device's batches of a step. Neighboring examples have similar lengths, so they stay in one
        batch, and batches are assigned to the devices in turn.
        """
        batches = self._batches(len(step)) * self._devices
        smaller, larger = divmod(len(step), batches)
        ends = [number * smaller + min(number, larger) for number in range(batches + 1)]
        return [
            list(step[ends[number] : ends[number + 1]]) or [filler]
            for number in range(self._rank, batches, self._devices)
        ]
