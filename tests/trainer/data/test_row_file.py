"""Tests that training rows are written to disk once, and read again only if they are complete."""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample
from trainer.data.packing import pack
from trainer.data.row_file import TrainingRows, read_or_write_rows, row_lengths, rows_key


def example(*lengths: int) -> list[TokenizedExample]:
    return [TokenizedExample(tuple(range(length)), ((1, length),)) for length in lengths]


EXAMPLES = [example(4), example(9, 3), *[example(number % 7 + 2) for number in range(2500)]]


def refusing() -> Iterator[Sequence[TokenizedExample]]:
    raise AssertionError("tokenized again")
    yield []


def same(one: TrainingRows, other: TrainingRows) -> bool:
    return one.dataset.to_list() == other.dataset.to_list() and np.array_equal(one.lengths, other.lengths)


@pytest.mark.slow
def test_token_rows_on_disk_equal_the_rows_in_memory(tmp_path: Path) -> None:
    rows, expected = read_or_write_rows(tmp_path / "tokens", "key", EXAMPLES), TrainingRows.in_memory(EXAMPLES)
    assert same(rows, expected)
    assert rows.tokens == expected.tokens == sum(len(row.input_ids) for rows in EXAMPLES for row in rows)
    assert list(rows.lengths[:3]) == [4, 9, 2]
    assert pack(rows.dataset, 16).to_list() == pack(expected.dataset, 16).to_list()


@pytest.mark.slow
@given(st.lists(st.integers(2, 20), min_size=1, max_size=30))
def test_length_of_a_row_is_its_number_of_tokens(lengths: list[int]) -> None:
    assert list(row_lengths(TrainingRows.in_memory([example(*lengths)]).dataset)) == lengths


def test_second_run_reads_stored_token_rows_instead_of_tokenizing(tmp_path: Path) -> None:
    first = read_or_write_rows(tmp_path / "tokens", "key", EXAMPLES)
    assert same(read_or_write_rows(tmp_path / "tokens", "key", refusing()), first)


def test_token_rows_stored_under_a_different_key_are_replaced(tmp_path: Path) -> None:
    read_or_write_rows(tmp_path / "tokens", "one", EXAMPLES)
    read_or_write_rows(tmp_path / "tokens", "two", EXAMPLES)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["two"]


def test_interrupted_write_of_token_rows_leaves_no_files(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Sequence[TokenizedExample]]:
        yield from EXAMPLES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_or_write_rows(tmp_path / "tokens", "key", interrupted())
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("name", ["rows.arrow", "lengths.npy", "complete.json"])
def test_incomplete_token_row_file_is_rewritten(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens" / "key" / name
    first = read_or_write_rows(tmp_path / "tokens", "key", EXAMPLES).loaded()
    path.write_bytes(path.read_bytes()[:-20])
    assert same(read_or_write_rows(tmp_path / "tokens", "key", EXAMPLES), first)


def test_token_rows_pickled_for_another_machine_include_their_data(tmp_path: Path) -> None:
    rows = read_or_write_rows(tmp_path / "tokens", "key", EXAMPLES)
    here, there = pickle.dumps(rows), pickle.dumps(rows.loaded())
    assert len(here) < len(there)
    assert same(pickle.loads(here), rows)
    expected = rows.dataset.to_list()
    (tmp_path / "tokens" / "key" / "rows.arrow").unlink()
    assert pickle.loads(there).dataset.to_list() == expected


def test_key_of_stored_token_rows_changes_if_any_input_to_tokenization_changes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    keys = {rows_key(tmp_path, "a", [1]), rows_key(tmp_path, "b", [1]), rows_key(tmp_path, "a", [2])}
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    keys.add(rows_key(tmp_path, "a", [1]))
    (tmp_path / "tokenizer.json").write_text('{"version": "1"}')
    assert len(keys | {rows_key(tmp_path, "a", [1])}) == 5
