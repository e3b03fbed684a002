"""Tests which adapters are saved at the ends of epochs."""

import errno
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from trainer.callbacks.epoch_adapters import EpochAdapters


class Saved:
    """The epochs that the callback has saved.

    Attributes:
        full: whether the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = False
        self.reported = list[tuple[int, str]]()
        self._callback = EpochAdapters(
            folder, 2, self._save, lambda step, path: self.reported.append((step, path.name))
        )

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        if self.full:
            raise OSError(errno.ENOSPC, "no space left on device")
        (folder / "adapter_config.json").write_text("{}")

    def end(self, epoch: float, step: int, *, first: bool = True) -> None:
        """End an epoch."""
        state = TrainerState(epoch=epoch, global_step=step, is_world_process_zero=first)
        self._callback.on_epoch_end(None, state, TrainerControl())

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path / "epochs")


def test_only_adapters_of_the_last_epochs_are_kept_but_every_epoch_is_reported(saved: Saved) -> None:
    for epoch in (1, 2, 3):
        saved.end(epoch, 10 * epoch)
    assert saved.names == ["step-00000020", "step-00000030"]
    assert saved.reported == [(10, "step-00000010"), (20, "step-00000020"), (30, "step-00000030")]


def test_repeating_an_epoch_replaces_the_adapter_saved_for_that_epoch(saved: Saved) -> None:
    for _ in range(2):
        saved.end(1, 10)
    assert saved.names == ["step-00000010"]


def test_no_epoch_adapter_is_saved_within_an_epoch_or_by_devices_other_than_the_first(saved: Saved) -> None:
    saved.end(0.5, 5)
    saved.end(1, 10, first=False)
    assert saved.reported == []


def test_training_continues_when_an_epoch_adapter_cannot_be_saved_because_the_disk_is_full(saved: Saved) -> None:
    saved.end(1, 10)
    saved.full = True
    saved.end(2, 20)
    assert saved.names == ["step-00000010"]
    assert saved.reported == [(10, "step-00000010")]
