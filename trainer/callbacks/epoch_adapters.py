"""Saves the adapter at the end of each of the last few epochs, for clients of the fine-tuning API.

A run cannot resume from these adapters, because they lack the optimizer's state. Imports transformers.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

log = logging.getLogger(__name__)

_PREFIX, _UNFINISHED = "step-", ".unfinished"
_WHOLE = 1e-6


class EpochAdapters(TrainerCallback):
    """Training callback that saves the adapter after each complete epoch.

    Args:
        folder: parent folder, with one subfolder for each saved epoch.
        keep: number of epochs to keep.
        save: function that saves the adapter to a folder.
        on_saved: called with the step and the folder of each saved epoch.
    """

    def __init__(
        self, folder: Path, keep: int, save: Callable[[Path], None], on_saved: Callable[[int, Path], None]
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._save = save
        self._on_saved = on_saved

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the adapter, unless a signal or early stopping cut the epoch short. A full disk does not stop
        training.
        """
        epoch = state.epoch or 0.0
        if not state.is_world_process_zero or abs(epoch - round(epoch)) > _WHOLE:
            return
        folder, unfinished = self._folder / f"{_PREFIX}{state.global_step:08d}", self._folder / _UNFINISHED
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)  # of the same step before a resume
            self._save(unfinished)
            unfinished.rename(folder)
        except OSError:
            log.warning("could not save the adapter after step %d", state.global_step, exc_info=True)
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        for old in sorted(self._folder.glob(f"{_PREFIX}*"))[: -self._keep]:
            shutil.rmtree(old)
        self._on_saved(state.global_step, folder)
