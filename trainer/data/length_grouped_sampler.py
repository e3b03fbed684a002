"""Groups examples of similar length into batches, in a random order that depends only on the seed and the
epoch.

The order of batches is random because a task's losses depend on length: if batches went from long to
short, the loss curve of a healthy run would rise or fall with the lengths, and the last steps of an epoch
would train only on short examples.

A sampler that uses the process's global random number generator cannot be resumed, because the batches would differ
from those of an uninterrupted run. Imports torch.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

_LISTED = 2**16
"""Number of indices that are converted to Python objects at a time, to limit memory usage."""
_MAX_WINDOW = 50
"""Maximum number of batches whose examples are sorted by length together."""


class LengthGroupedSampler(Sampler[int]):
    """Yields example indices, grouped into batches of similar length.

    Args:
        lengths: number of tokens in each example.
        batch_size: number of examples per step.
        seed: seed of the run.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int32], batch_size: int, seed: int) -> None:
        self._lengths = torch.from_numpy(np.array(lengths, np.int64))
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The trainer's data loader calls this before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        mixed = np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)  # torch uses 32 bits of a seed
        generator = torch.Generator().manual_seed(int(mixed[0]))
        # At most half of the examples are sorted together, so that the batches of a small set differ between epochs.
        window = max(1, min(_MAX_WINDOW, len(self._lengths) // (2 * self._batch_size)))
        drawn = torch.randperm(len(self._lengths), generator=generator).split(window * self._batch_size)
        ordered = torch.cat([part[self._lengths[part].argsort(descending=True, stable=True)] for part in drawn])
        full = len(self._lengths) // self._batch_size
        batched, rest = ordered.split([full * self._batch_size, len(ordered) - full * self._batch_size])
        batches = batched.view(full, self._batch_size)[torch.randperm(full, generator=generator)]
        order = torch.cat([batches.flatten(), rest])
        return chain.from_iterable(part.tolist() for part in order.split(_LISTED))
