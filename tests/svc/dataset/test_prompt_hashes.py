"""Tests that prompts a version was trained on are recognized without their texts."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from svc.dataset.checks.line_table import LineTableBuilder
from svc.dataset.prompt_hashes import hash_prompts, read_prompt_hashes, write_prompt_hashes
from svc.errors import IntegrityError
from tests.svc.chats import chat


def test_prompts_differing_in_spacing_and_case_share_a_hash() -> None:
    hashes = hash_prompts([chat("What is  red?", "a"), chat("what is red? ", "b"), chat("What is blue?", "a")])
    assert hashes[0] == hashes[1] != hashes[2]


def test_prompt_hashes_equal_the_hashes_in_the_table_of_examples() -> None:
    """A version's stored hashes are compared with the table of the next version's examples."""
    builder, examples = LineTableBuilder(), [chat("a"), chat("b")]
    for number, example in enumerate(examples):
        builder.add(0, number, example)
    assert builder.finish().rows["prompts"].tolist() == hash_prompts(examples).tolist()


def test_prompt_hashes_are_read_back_sorted_and_unique(tmp_path: Path) -> None:
    write_prompt_hashes(tmp_path / "h.npy", np.array([2**64 - 1, 5, 7, 5], np.uint64))
    assert read_prompt_hashes(tmp_path / "h.npy").tolist() == [5, 7, 2**64 - 1]


def test_stored_prompt_hash_takes_eight_bytes(tmp_path: Path) -> None:
    write_prompt_hashes(tmp_path / "h.npy", hash_prompts(chat(f"question {number}") for number in range(1000)))
    assert (tmp_path / "h.npy").stat().st_size <= 8 * 1000 + 128


@pytest.mark.parametrize("size", [0, 5, 100, 130])
def test_truncated_prompt_hash_file_raises_error(tmp_path: Path, size: int) -> None:
    write_prompt_hashes(path := tmp_path / "h.npy", hash_prompts([chat("a"), chat("b")]))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"cannot read .*h\.npy"):
        read_prompt_hashes(path)


@pytest.mark.parametrize("write", [partial(np.save, arr=np.zeros(3)), partial(np.savez, arr=np.zeros(3, np.uint64))])
def test_array_file_without_prompt_hashes_raises_error(tmp_path: Path, write: Callable[[BytesIO], None]) -> None:
    write(content := BytesIO())
    (tmp_path / "h.npy").write_bytes(content.getvalue())
    with pytest.raises(IntegrityError, match="contains no prompt hashes"):
        read_prompt_hashes(tmp_path / "h.npy")
