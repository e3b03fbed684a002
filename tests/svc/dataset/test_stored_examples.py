"""Tests sequences of examples that are on disk."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset import stored_examples
from svc.dataset.readers.reader import read_examples
from svc.dataset.stored_examples import StoredExamples, collect, join, select
from tests.published_examples import published
from tests.svc.chats import chat

IN_MEMORY = [chat(f"question {number}") for number in range(40)]


@pytest.fixture(autouse=True)
def few_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_examples, "MAX_IN_MEMORY", 5)


@pytest.fixture
def stored() -> StoredExamples:
    examples = collect(IN_MEMORY)
    assert isinstance(examples, StoredExamples)
    return examples


def test_small_number_of_examples_is_kept_in_memory() -> None:
    assert collect(iter(IN_MEMORY[:5])) == IN_MEMORY[:5]


def test_stored_examples_are_read_like_a_list(stored: StoredExamples) -> None:
    assert len(stored) == 40
    assert list(stored) == IN_MEMORY
    assert stored[-1] == IN_MEMORY[-1]
    assert list(stored[3:20:2]) == IN_MEMORY[3:20:2]


def test_tools_and_weights_are_unchanged_in_examples_stored_on_disk(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(published(drone=3))
    (tmp_path / "drone.jsonl").write_text(published(drone=3) * 3)
    examples = read_examples(tmp_path / "drone.jsonl")
    assert isinstance(examples, StoredExamples)
    assert list(examples) == [*read_examples(tmp_path / "one.jsonl")] * 3
    assert all(example.tools for example in examples)


@given(st.lists(st.integers(0, 39)))
def test_selected_stored_examples_are_returned_in_the_order_of_the_indices(chosen: list[int]) -> None:
    assert list(select(collect(IN_MEMORY), chosen)) == select(IN_MEMORY, chosen)


@pytest.mark.parametrize("count", [0, 3, 40], ids=["none", "list", "other file"])
def test_joined_example_lists_are_read_in_sequence(stored: StoredExamples, count: int) -> None:
    others = collect(IN_MEMORY[:count])
    assert isinstance(others, StoredExamples) == (count == 40)
    assert list(join(others, stored, stored[:2])) == [*others, *IN_MEMORY, *IN_MEMORY[:2]]


def test_stored_examples_are_not_visible_as_a_file_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    examples = collect(IN_MEMORY)
    assert list(tmp_path.iterdir()) == []
    assert examples[0] == IN_MEMORY[0]
