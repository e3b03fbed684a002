"""Tests that packed examples fill rows, and that no example attends to another."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from svc.errors import RecipeError
from trainer.data.chat_template import IGNORED
from trainer.data.packing import collate_packed, pack, refuse_recurrent
from trainer.training.loss import answer_loss

MODEL = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16
    )
).float()
LENGTH = 24

rows = st.lists(
    st.tuples(st.lists(st.integers(1, 49), min_size=2, max_size=LENGTH), st.integers(1, 23)), min_size=1, max_size=7
)


def dataset(examples: list[tuple[list[int], int]]) -> Dataset:
    """Return rows whose answer starts at the given index or consists of only the last token."""
    contents = []
    for ids, start in examples:
        answer = min(start, len(ids) - 1)
        contents.append({"input_ids": ids, "labels": [IGNORED] * answer + ids[answer:]})
    return Dataset.from_list(contents)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(rows)
def test_loss_of_packed_examples_equals_their_individual_losses(examples: list[tuple[list[int], int]]) -> None:
    alone = torch.zeros(())
    for row in dataset(examples):
        alone = alone + answer_loss(MODEL, torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]))
    batch = collate_packed(list(pack(dataset(examples), LENGTH)), pad_token=0)
    packed = answer_loss(MODEL, batch["input_ids"], batch["labels"], batch["position_ids"])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(rows)
def test_every_example_is_packed_exactly_once_without_truncation(examples: list[tuple[list[int], int]]) -> None:
    unpacked = []
    for row in pack(dataset(examples), LENGTH):
        assert len(row["input_ids"]) <= LENGTH
        start = 0
        for length in row["seq_lengths"]:
            unpacked.append(row["input_ids"][start : start + length])
            start += length
    assert sorted(unpacked) == sorted(ids for ids, _ in examples)


def test_short_examples_are_packed_into_shared_rows() -> None:
    assert len(pack(dataset([([1] * 8, 1)] * 9), LENGTH)) == 3


RECURRENT = [Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), Qwen3NextConfig(), MambaConfig()]


@pytest.mark.parametrize("config", RECURRENT, ids=lambda config: config.model_type)
def test_packing_rejects_a_model_with_recurrent_layers(config: PreTrainedConfig) -> None:
    with pytest.raises(RecipeError, match="recurrent layers"):
        refuse_recurrent(config)


@pytest.mark.parametrize("config", [LlamaConfig(), Gemma2Config()], ids=lambda config: config.model_type)
def test_packing_accepts_a_model_with_only_attention_layers(config: PreTrainedConfig) -> None:
    refuse_recurrent(config)
