"""The order of examples: batches of similar lengths in random order, a function of seed and epoch alone.

The order of batches is random because a task's losses depend on length: if batches went from long to short, the loss
curve of a healthy run would rise or fall with them, and the last steps of an epoch would train on short examples alone.

A sampler that draws from the process's random numbers cannot be continued: a resumed run would see other batches than
one that was never interrupted. Imports torch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

_LARGEST_WINDOW = 50
"""Batches among whose examples similar lengths are looked for."""


class LengthGroupedSampler(Sampler[int]):
    """Indices of examples.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a step, which have similar lengths.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch by the trainer's data loader."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        mixed = np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)  # torch takes 32 bits of a seed
        generator = torch.Generator().manual_seed(int(mixed[0]))
        # At most half of the examples are sorted together, so that each epoch of a small set has other batches.
        window = max(1, min(_LARGEST_WINDOW, len(self._lengths) // (2 * self._batch_size)))
        batches: list[torch.Tensor] = []
        for drawn in torch.randperm(len(self._lengths), generator=generator).split(window * self._batch_size):
            batches += drawn[self._lengths[drawn].argsort(descending=True, stable=True)].split(self._batch_size)
        whole = len(self._lengths) // self._batch_size
        order = [*torch.randperm(whole, generator=generator).tolist(), *range(whole, len(batches))]
        return iter([index for place in order for index in batches[place].tolist()])
