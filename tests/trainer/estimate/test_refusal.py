"""A training is refused only when it cannot be."""

from pathlib import Path

import pytest

from svc.engine.machine import Machine
from svc.errors import DiskSpaceError, InsufficientMemoryError
from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, published
from trainer.estimate.batches import even_workload
from trainer.estimate.estimate import Estimate, estimate_recipe
from trainer.estimate.refusal import refuse_disk, refuse_memory


def estimated(method: str) -> Estimate:
    recipe = make_recipe(method=method, train={"batch_size": 64})
    return estimate_recipe(recipe, published("llama-2-7b"), even_workload(100, 1024, recipe), [cpu_device()], 4096)


def machine(memory: float) -> Machine:
    return Machine(cores=(0,), quota=None, memory=int(memory), free=0)


@pytest.fixture(autouse=True)
def _large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 1e12)


def set_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


def test_what_cannot_fit_is_refused_with_how_much_is_missing_and_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"has 32\.0 GB: 75\.8 GB too few") as caught:
        refuse_memory(estimated("full"), machine(32e9))
    assert "--anyway" in caught.value.todo


def test_what_would_fit_with_a_smaller_batch_is_not_refused(tmp_path: Path) -> None:
    estimate = estimated("lora")
    assert estimate.here is not None
    assert not estimate.here.fits
    refuse_memory(estimate, machine(24e9))


def test_what_is_free_now_decides_nothing(tmp_path: Path) -> None:
    refuse_memory(estimated("qlora"), machine(16e9))


def test_a_disk_too_small_for_the_merged_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 5e9)
    with pytest.raises(DiskSpaceError, match=r"5\.0 GB are free"):
        refuse_disk(estimated("qlora"), tmp_path)


def test_a_run_that_has_written_before_is_not_refused_for_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 5e9)
    (tmp_path / "runs" / "tiny-0123").mkdir(parents=True)
    refuse_disk(estimated("qlora"), tmp_path)
