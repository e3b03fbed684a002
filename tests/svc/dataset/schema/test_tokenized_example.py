"""Tests that token ids of examples survive a round trip through a file, and that other files are reported."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.schema.tokenized_example import TokenizedExample, read_tokenized, write_tokenized
from svc.errors import IntegrityError


@st.composite
def examples(draw: st.DrawFn) -> TokenizedExample:
    ids = draw(st.lists(st.integers(0, 2**18), min_size=4, max_size=20))
    places = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=4)))
    return TokenizedExample(tuple(ids), tuple(zip(places[::2], places[1::2], strict=False)))


@pytest.mark.slow
@given(st.lists(examples(), max_size=5))
def test_written_tokenized_examples_round_trip(
    tmp_path_factory: pytest.TempPathFactory, written: list[TokenizedExample]
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "tokens.jsonl"
    write_tokenized(path, written)
    assert read_tokenized(path) == tuple(written)


@given(examples())
def test_tokenized_example_is_split_into_prompt_and_answer_at_the_last_trained_answer(
    example: TokenizedExample,
) -> None:
    start, end = example.learnt[-1]
    assert example.prompt + example.answer == example.input_ids[:end]
    assert len(example.prompt) == start
    assert example.scored == sum(end - start for start, end in example.learnt)


@pytest.mark.parametrize(
    "content", ["{}", '{"input_ids": [1], "learnt": []}', '{"input_ids": [-1], "learnt": [[0, 1]]}']
)
def test_line_that_is_not_a_tokenized_example_raises_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.jsonl").write_text(content)
    with pytest.raises(IntegrityError, match="cannot read"):
        read_tokenized(tmp_path / "tokens.jsonl")


def test_missing_tokenized_examples_file_raises_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot read"):
        read_tokenized(tmp_path / "none.jsonl")
