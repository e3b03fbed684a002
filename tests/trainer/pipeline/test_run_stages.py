"""Tests that a library failure in a stage becomes our own error, with its traceback written to a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from svc.child_process import in_child_process
from svc.errors import TrainingError
from svc.files.json_file import read_json_object
from svc.registry.files import read_headers
from tests.trainer.pipeline.failing import fail_in_numpy
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.pipeline import model_stages as stages_module
from trainer.pipeline.run_stages import LOG_FILE, failed_library, stage_failure
from trainer.recipe.stage import Stage


def fail_in_torch() -> None:
    """Fail in the same way as gptqmodel did for a padding token without an embedding row."""
    import torch

    torch.nn.Embedding(10, 4, padding_idx=12)


def caught(work: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any
        work()
    return raised.value


@pytest.mark.slow
def test_error_caused_by_a_library_names_the_library_and_points_to_the_log_file(
    make: Make, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "quantize_to_4_bits", lambda *_, **__: fail_in_torch())
    pipeline = make()
    with pytest.raises(TrainingError) as raised:
        pipeline.train_version()
    assert raised.value.wrong == (
        "stage quantize failed in torch: AssertionError: Padding_idx must be within num_embeddings"
    )
    log = pipeline.run.folder / LOG_FILE
    assert str(log) in raised.value.todo
    assert "run the same command again" in raised.value.todo
    assert "padding_idx=12" in log.read_text("utf-8")


@pytest.mark.slow
def test_error_names_the_library_that_failed_in_a_child_process() -> None:
    assert failed_library(caught(lambda: in_child_process(fail_in_numpy))) == "numpy"


def test_error_names_the_called_library_when_its_dependency_fails() -> None:
    """click calls a function of these tests, which calls numpy. The library that our code called is click."""
    import click

    command = click.Command("fail", callback=lambda: np.zeros(2).reshape(3))
    error = caught(lambda: CliRunner().invoke(command, catch_exceptions=False))
    assert failed_library(error) == "click"


def test_error_names_no_library_when_the_failure_is_in_tuneserve_code(tmp_path: Path) -> None:
    error = caught(lambda: read_json_object(None))  # type: ignore[arg-type]
    assert failed_library(error) is None
    assert stage_failure(Stage.MERGE, error, tmp_path) is None
    assert not (tmp_path / LOG_FILE).exists()


def test_error_names_no_library_when_tuneserve_code_fails_in_a_library_callback() -> None:
    assert failed_library(caught(lambda: read_headers(None))) is None  # type: ignore[arg-type]
