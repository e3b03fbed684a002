"""Packing: several examples in one row, so that short ones fill the length that a row may have.

Positions begin anew with each example. From that, transformers masks attention between them, so that an example is
learnt as it would be alone. Loaded only inside functions: it imports torch and TRL.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import pack_dataset

from trainer.training_example import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


def pack(rows: "Dataset", max_length: int) -> "Dataset":
    """Examples in as few rows as best-fit-decreasing finds, each with `seq_lengths`, the lengths of its examples.

    Args:
        rows: `input_ids` and `labels`, none longer than `max_length`.
        max_length: tokens of a row.
    """
    return pack_dataset(
        rows, max_length, strategy="bfd", map_kwargs={"batch_size": None, "load_from_cache_file": False}
    )


def collate_packed(rows: Sequence[dict[str, Any]], pad_token: int) -> dict[str, Tensor]:
    """A batch of packed rows, padded on the right.

    Returns:
        input_ids, labels, position_ids, attention_mask: [rows, longest row].
    """

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return pad_sequence([torch.tensor(one) for one in values], batch_first=True, padding_value=filler)

    positions = [[place for length in row["seq_lengths"] for place in range(length)] for row in rows]
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad_token),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "position_ids": padded(positions, 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),  # counts tokens, masks nothing
    }
