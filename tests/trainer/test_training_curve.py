"""Tests that a training curve is read as it was written, and that a damaged file is reported."""

from pathlib import Path

import pytest

from svc.errors import IntegrityError
from trainer.training_curve import TrainingPoint, read_training_curve, write_training_curve

CURVE = (
    TrainingPoint(step=0, epoch=0.0, heldout_loss=3.0, heldout_each=(2.5, 3.5)),
    TrainingPoint(step=1, epoch=0.5, loss=2.9, learning_rate=1e-4, grad_norm=1.5, tokens_per_second=200.0),
)


def test_written_training_curve_round_trips(tmp_path: Path) -> None:
    write_training_curve(tmp_path / "training.jsonl", CURVE)
    assert read_training_curve(tmp_path / "training.jsonl") == CURVE


def test_missing_values_are_not_stored_in_the_training_curve(tmp_path: Path) -> None:
    write_training_curve(tmp_path / "training.jsonl", [TrainingPoint(step=2, epoch=1.0, loss=0.5)])
    assert (tmp_path / "training.jsonl").read_text("utf-8") == '{"step":2,"epoch":1.0,"loss":0.5}\n'


@pytest.mark.parametrize("content", ["{", '{"step":-1,"epoch":0}\n', '{"step":1,"epoch":0,"other":1}\n'])
def test_corrupt_training_curve_line_raises_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "training.jsonl").write_text(content, "utf-8")
    with pytest.raises(IntegrityError, match=r"training\.jsonl:1 is not a valid point"):
        read_training_curve(tmp_path / "training.jsonl")
