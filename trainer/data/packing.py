"""Packs several short examples into each row, so that rows are filled up to the maximum length.

Position ids restart with each example. From these, transformers derives an attention mask that separates the examples,
so each example is trained on as if it were alone in its row. Imports torch and TRL.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from trl import pack_dataset

from svc.errors import RecipeError
from trainer.data.chat_template import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

_TOGETHER = 100_000
"""Number of examples that are packed at a time. Packing a larger data set in one pass would load all of it into
memory."""


def refuse_recurrent(config: "PreTrainedConfig") -> None:
    """Reject models with recurrent layers, whose state would carry over from one packed example to the next.

    Raises:
        RecipeError: the model has recurrent layers.
    """
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        raise RecipeError(
            f"train.packing cannot be used with a base model of type {config.model_type}: its recurrent layers would "
            "carry their state from one example into the next",
            todo="set train.packing to false",
        )


def pack(rows: "Dataset", max_length: int) -> "Dataset":
    """Pack examples into rows by best-fit decreasing, which keeps the number of rows low. The returned `seq_lengths`
    column lists the lengths of each row's examples.

    Args:
        rows: examples with `input_ids` and `labels`, none longer than `max_length`.
        max_length: number of tokens per row.
    """
    together = None if len(rows) <= _TOGETHER else _TOGETHER
    return pack_dataset(
        rows, max_length, strategy="bfd", map_kwargs={"batch_size": together, "load_from_cache_file": False}
    )


def collate_packed(rows: Sequence[dict[str, Any]], pad_token: int) -> dict[str, Tensor]:
    """Collate packed rows into a batch, padded on the right. A row without `seq_lengths` is a single example.

    Returns:
        input_ids, labels, position_ids, attention_mask: [rows, longest row].
    """

    def padded(values: list[list[int]], padding: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=padding)

    lengths = [row.get("seq_lengths", [len(row["input_ids"])]) for row in rows]
    positions = [[position for length in row for position in range(length)] for row in lengths]
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "position_ids": padded(positions, 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),  # counts tokens, masks nothing
    }
