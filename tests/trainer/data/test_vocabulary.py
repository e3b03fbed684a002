"""Tests that token ids without an embedding row are found before training starts."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import BaseModelError, DataError
from tests.trainer.conftest import make_tokenizer
from trainer.data.vocabulary import check_tokenizer, checked_ids

FOLDER = Path("model")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer with 256 bytes and two special tokens, the second of which ends a turn."""
    return make_tokenizer()


def test_tokenizer_is_accepted_when_every_id_has_an_embedding_row(tokenizer: PreTrainedTokenizerBase) -> None:
    check_tokenizer(FOLDER, tokenizer, {257}, 258)


def test_tokenizer_is_accepted_when_only_an_unused_token_has_no_embedding_row(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    check_tokenizer(FOLDER, tokenizer, {257}, 258)


def test_tokenizer_is_rejected_when_the_padding_token_has_no_embedding_row(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(BaseModelError, match=r"pad token '\[PAD\]' of model has id 258, but the model has 258"):
        check_tokenizer(FOLDER, tokenizer, {257}, 258)


def test_tokenizer_is_rejected_when_an_end_token_has_no_embedding_row(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BaseModelError, match="has id 300"):
        check_tokenizer(FOLDER, tokenizer, {257, 300}, 258)


def test_tokenizer_is_rejected_when_ordinary_tokens_have_no_embedding_row(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(BaseModelError, match="has ids up to 255, but the model has 200 embedding rows"):
        check_tokenizer(FOLDER, tokenizer, {100}, 200)


def test_base_without_an_end_of_answer_token_is_rejected(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(BaseModelError, match="does not specify a token that ends an answer"):
        check_tokenizer(FOLDER, tokenizer, set(), 258)


def test_error_for_a_token_without_an_embedding_row_names_the_example() -> None:
    rows = [[TokenizedExample((1, 2), ((1, 2),))], [TokenizedExample((1, token), ((1, 2),)) for token in (2, 258)]]
    assert list(checked_ids(rows, 259, "training")) == rows
    with pytest.raises(DataError, match="training example 2 contains the token id 258"):
        list(checked_ids(rows, 258, "training"))
