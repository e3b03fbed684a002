"""A reader follows the progress of a training that another process writes."""

from pathlib import Path

from svc.training_progress import ProgressFile, ProgressReader, Registered, StageBegun, StepDone

_STEP = StepDone(step=3, steps=12, epoch=0.25, loss=1.5, tokens=900)


def test_progress_records_are_read_once_in_the_order_written(tmp_path: Path) -> None:
    file, reader = ProgressFile(tmp_path / "progress"), ProgressReader(tmp_path / "progress")

    assert reader.read() == []
    file.write(StageBegun(name="train"))
    file.write(_STEP)

    assert reader.read() == [StageBegun(name="train"), _STEP]
    file.write(Registered(version="bot@1"))
    assert reader.read() == [Registered(version="bot@1")]


def test_progress_record_is_read_only_after_it_has_been_written_completely(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    ProgressFile(path).write(_STEP)
    line = path.read_bytes()
    path.write_bytes(line[:20])
    reader = ProgressReader(path)

    assert reader.read() == []
    path.write_bytes(line)
    assert reader.read() == [_STEP]


def test_progress_line_truncated_by_a_full_disk_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    path.write_bytes(b'{"kind":"step","st')
    ProgressFile(path).write(_STEP)
    ProgressFile(path).write(Registered(version="bot@1"))

    assert ProgressReader(path).read() == [Registered(version="bot@1")]
