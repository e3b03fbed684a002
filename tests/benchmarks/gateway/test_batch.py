"""Tests the input of the benchmark of batches."""

from pathlib import Path

from benchmarks.gateway.batch import _add_input
from serving.files.batch_check import check_batch_file
from serving.files.rows import Purpose, find_file
from svc.settings.load import load_settings
from svc.store.database import open_store


def test_generated_batch_input_file_is_valid_and_can_be_used_without_an_api_key(tmp_path: Path) -> None:
    id = _add_input(tmp_path, 3)
    check = check_batch_file(tmp_path / "files" / id)
    assert (check.requests, check.problems) == (3, ())
    assert check.endpoints == {"/v1/chat/completions"}
    store = open_store(load_settings(home=tmp_path))
    assert find_file(store, id, "").purpose is Purpose.BATCH
    store.dispose()
