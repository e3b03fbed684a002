"""The order of examples: of like length together, anew in each epoch, and a function of seed and epoch alone.

A sampler that draws from the process's random numbers cannot be continued: a resumed run would see other batches than
one that was never interrupted. Imports torch and transformers.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

_LONGEST_RUN = 50  # batches


class LengthGroupedSampler(Sampler[int]):
    """Indices of examples.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a step, over which lengths are alike.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
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
        # Sorted are runs of so many batches; as the default, but for small sets too: half of them in one run.
        run = max(1, min(_LONGEST_RUN, len(self._lengths) // (2 * self._batch_size)))
        indices: list[int] = get_length_grouped_indices(
            self._lengths, self._batch_size, mega_batch_mult=run, generator=generator
        )
        return iter(indices)
