"""Tests that a source is resolved to files: a single file, a folder's files, or those of a hub dataset."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from svc.dataset.readers.reader import read_examples, write_examples
from svc.dataset.readers.source import data_files, newest_modification
from svc.errors import DataError
from tests.svc.chats import chat


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(folder: Path, files: list[Path]) -> list[str]:
    return [str(path.relative_to(folder)) for path in files]


def test_data_source_that_is_a_file_yields_only_that_file(tmp_path: Path) -> None:
    assert data_files(tmp_path / "x.txt") == [tmp_path / "x.txt"]


def test_data_source_given_as_a_folder_lists_its_data_files_in_sorted_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.csv", "a/z.jsonl.gz", "c.parquet", "README.md", "dataset_infos.json", ".cache/d.jsonl", "load.py"
    )
    assert names(tmp_path, data_files(tmp_path)) == ["a/z.jsonl.gz", "b.csv", "c.parquet"]


def test_folder_examples_are_read_in_file_order(tmp_path: Path) -> None:
    write_examples(tmp_path / "2.jsonl", [chat("b")])
    write_examples(tmp_path / "1.jsonl", [chat("a")])
    assert read_examples(tmp_path) == [chat("a"), chat("b")]


class Hub:
    """Replacement for `snapshot_download` that records its arguments."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder = folder
        self.error = error
        self.asked: dict[str, Any] = {}

    def __call__(self, dataset: str, **options: Any) -> str:
        self.asked = {"dataset": dataset, **options}
        if self.error:
            raise self.error
        return str(self.folder)


def test_hub_dataset_is_downloaded_to_the_cache_and_read_as_a_folder(tmp_path: Path) -> None:
    touch(tmp_path / "snapshot", "data/train-0.parquet", "data/train-1.parquet")
    hub = Hub(tmp_path / "snapshot")
    found = data_files("hf:org/name", tmp_path / "cache", fetch=hub)
    assert names(tmp_path / "snapshot", found) == ["data/train-0.parquet", "data/train-1.parquet"]
    assert (hub.asked["dataset"], hub.asked["repo_type"]) == ("org/name", "dataset")
    assert (hub.asked["revision"], hub.asked["cache_dir"]) == (None, tmp_path / "cache" / "hub")


def test_only_data_files_are_downloaded_from_the_hub(tmp_path: Path) -> None:
    touch(tmp_path, "x.jsonl")
    hub = Hub(tmp_path)
    data_files("hf:org/name", tmp_path, fetch=hub)
    assert "*.parquet" in hub.asked["allow_patterns"] and "*.jsonl.gz" in hub.asked["allow_patterns"]
    assert not any(pattern.endswith((".py", "*")) for pattern in hub.asked["allow_patterns"])


ULTRACHAT = [
    f"data/{split}-{part:05}-of-00003.parquet"
    for split in ("test_gen", "test_sft", "train_gen", "train_sft")
    for part in range(3)
]
GSM8K = [f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic") for split in ("test", "train")]


@pytest.mark.parametrize(
    ("published", "chosen"),
    [
        pytest.param(ULTRACHAT, ULTRACHAT[6:], id="HuggingFaceH4/ultrachat_200k"),
        pytest.param(GSM8K, GSM8K[1::2], id="openai/gsm8k"),
        pytest.param(
            ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"],
            ["data/train-00000-of-00001.parquet"],
            id="OpenAssistant/oasst1",
        ),
        pytest.param(
            ["my_train_file.csv", "test-file.csv", "validation1.csv"],
            ["my_train_file.csv"],
            id="datasets-examples/doc-splits-3",
        ),
        pytest.param(["databricks-dolly-15k.jsonl"], ["databricks-dolly-15k.jsonl"], id="databricks-dolly-15k"),
        pytest.param(["latest.jsonl", "train_test_mix.jsonl"], ["latest.jsonl", "train_test_mix.jsonl"], id="words"),
    ],
)
def test_validation_and_test_splits_of_a_hub_dataset_are_excluded(
    tmp_path: Path, published: list[str], chosen: list[str]
) -> None:
    touch(tmp_path, *published)
    assert names(tmp_path, data_files("hf:org/test", tmp_path, fetch=Hub(tmp_path))) == chosen


@pytest.mark.parametrize("named", ["main/test-00000-of-00001.parquet", "validation", "VALIDATION"])
def test_explicitly_named_split_of_a_hub_dataset_is_used(tmp_path: Path, named: str) -> None:
    touch(tmp_path, *GSM8K, "validation/a.parquet", "VALIDATION/a.parquet")
    assert len(data_files(f"hf:org/name/{named}", tmp_path, fetch=Hub(tmp_path))) == 1


def test_hub_dataset_without_a_training_split_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "data/test.parquet", "data/validation.parquet")
    error = refusal("hf:org/name", Hub(tmp_path))
    assert error.wrong.endswith("contains only test and validation splits: data/test.parquet, data/validation.parquet")
    assert "hf:org/name/FILE-OR-FOLDER" in (error.todo or "")


def test_hub_dataset_path_can_select_a_file_and_revision(tmp_path: Path) -> None:
    touch(tmp_path, "data/train.parquet", "data/test.parquet")
    hub = Hub(tmp_path)
    assert names(tmp_path, data_files("hf:org/name@v1/data/train.parquet", tmp_path, fetch=hub)) == [
        "data/train.parquet"
    ]
    assert hub.asked["revision"] == "v1"


def refusal(source: str, fetch: Hub) -> DataError:
    with pytest.raises(DataError) as caught:
        data_files(source, Path("/nowhere"), fetch=fetch)
    assert caught.value.todo
    return caught.value


def test_unreachable_hub_raises_error_with_advice(tmp_path: Path) -> None:
    error = refusal("hf:org/name", Hub(tmp_path, LocalEntryNotFoundError("offline")))
    assert "dataset org/name is not in the cache and the Hugging Face hub cannot be reached" in error.wrong
    assert "copy the dataset to this machine" in error.todo


def test_unknown_hub_dataset_raises_error(tmp_path: Path) -> None:
    error = refusal("hf:org/name", Hub(tmp_path, HFValidationError("no such dataset\n\nmore")))
    assert error.wrong == "the Hugging Face hub rejected dataset org/name: no such dataset"


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:org/name/../../etc", "hf:org/na me"])
def test_invalid_dataset_name_is_rejected_before_download(tmp_path: Path, source: str) -> None:
    hub = Hub(tmp_path)
    assert f"{source!r} is not a valid hub dataset" in refusal(source, hub).wrong
    assert hub.asked == {}


def test_missing_path_in_a_hub_dataset_raises_error(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl")
    assert "no data file or folder 'test'" in refusal("hf:org/name/test", Hub(tmp_path)).wrong


def test_missing_file_error_explains_hub_dataset_syntax() -> None:
    with pytest.raises(DataError) as caught:
        read_examples("org/name")
    assert "hf:ORG/NAME" in caught.value.todo


def test_latest_modification_time_is_found_among_local_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, seconds in (("a.jsonl", 100), ("folder/b.jsonl", 300), ("folder/c.csv", 200)):
        (tmp_path / name).write_text("{}\n", "utf-8")
        os.utime(tmp_path / name, (seconds, seconds))
    assert newest_modification([tmp_path / "a.jsonl", str(tmp_path / "folder")]) == datetime.fromtimestamp(300, UTC)


def test_latest_modification_time_is_none_without_local_files() -> None:
    assert newest_modification(["hf:org/name"]) is None
