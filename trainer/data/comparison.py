"""Tokenizes preferences for preference tuning, and forms batches of them.

Both answers of a pair are tokenized like reference answers, each after the prompt that the engine renders. The compared
likelihoods are therefore the same as in serving. Imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import DataError
from svc.model_folder.chat_template import TemplateKwargs
from trainer.data.chat_template import IGNORED, tokenize_examples, training_row
from trainer.data.length import fit_length, truncate
from trainer.recipe.train import Train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers whose likelihoods are compared.

    Attributes:
        first: a pair's chosen answer, or a labeled answer.
        second: the pair's rejected answer. For a labeled answer, an answer to a different prompt, appended to the
            labeled answer's prompt; its likelihood shows how far the model has moved as a whole (Ethayarajh et al.
            2024, section 4.2).
        desirable: label of a labeled answer; true for a pair.
    """

    first: TokenizedExample
    second: TokenizedExample
    desirable: bool = True


def tokenize_preferences(
    tokenizer: "PreTrainedTokenizerBase",
    preferences: Sequence[PreferencePair | LabeledAnswer],
    stops: set[int],
    template_kwargs: TemplateKwargs,
    train: Train | None = None,
) -> list[Comparison]:
    """Tokenize pairs or labeled answers.

    Args:
        train: the recipe's `train` section, or None for answers used only for evaluation. With `too_long: drop`,
            answers longer than `max_length` are dropped, as are pairs with such an answer.

    Raises:
        DataError: an answer is too long or is rejected by the chat template, or all labeled answers have the same
            prompt.
    """
    if pairs := [pair for pair in preferences if isinstance(pair, PreferencePair)]:
        chosen = tokenize_examples(tokenizer, [pair.chosen for pair in pairs], stops, template_kwargs)
        rejected = tokenize_examples(tokenizer, [pair.rejected for pair in pairs], stops, template_kwargs)
        both = list(zip(chosen, rejected, strict=True))
        return [Comparison(first, second) for first, second in (fit_length(both, train) if train else both)]
    answers = [answer for answer in preferences if isinstance(answer, LabeledAnswer)]
    if not answers:
        return []
    tokenized = tokenize_examples(tokenizer, [answer.example for answer in answers], stops, template_kwargs)
    labeled = list(zip(tokenized, [answer.desirable for answer in answers], strict=True))
    if train is None:
        return _with_others(labeled)
    fit_length([[row] for row in tokenized], train)
    fitting = [(row, label) for row, label in labeled if len(row.input_ids) <= train.max_length]
    return [replace(pair, second=truncate(pair.second, train.max_length)) for pair in _with_others(fitting)]


def _with_others(labeled: Sequence[tuple[TokenizedExample, bool]]) -> list[Comparison]:
    """Pair each labeled answer with an answer to a different prompt. Both then follow the labeled answer's prompt.

    The other answer is the closest one before the labeled answer. The list is treated as circular: the last answer
    comes before the first.
    """
    comparisons = []
    for place, (row, desirable) in enumerate(labeled):
        others = (labeled[place - distance][0] for distance in range(1, len(labeled)))
        other = next((other for other in others if other.prompt != row.prompt), None)
        if other is None:
            raise DataError(
                "all labeled answers have the same prompt",
                expected="answers to at least two prompts, because each answer is compared with answers to other "
                "prompts",
            )
        ids, start = (*row.prompt, *other.answer), len(row.prompt)
        comparisons.append(Comparison(row, TokenizedExample(ids, ((start, len(ids)),)), desirable))
    return comparisons


def comparison_row(comparison: Comparison, index: int) -> dict[str, Any]:
    """Return a comparison in the form that the trainer expects.

    Args:
        index: index of this comparison's log-probabilities in the run's list of reference log-probabilities.
    """
    second = {f"second_{key}": value for key, value in training_row(comparison.second).items()}
    return {**training_row(comparison.first), **second, "desirable": comparison.desirable, "index": index}


def collate_comparisons(rows: Sequence[dict[str, Any]], pad_token: int) -> dict[str, Tensor]:
    """Collate comparisons into a batch, padded on the right.

    Returns:
        input_ids, labels, attention_mask: [2 * comparisons, longest answer with its prompt], all first answers
            before all second answers.
        desirable, index: [comparisons].
    """

    def padded(key: str, padding: int) -> Tensor:
        values = [torch.tensor(row[name]) for name in (key, f"second_{key}") for row in rows]
        return pad_sequence(values, batch_first=True, padding_value=padding)

    lengths = [len(row[name]) for name in ("input_ids", "second_input_ids") for row in rows]
    return {
        "input_ids": padded("input_ids", pad_token),
        "labels": padded("labels", IGNORED),
        "attention_mask": pad_sequence([torch.ones(length, dtype=torch.long) for length in lengths], batch_first=True),
        "desirable": torch.tensor([row["desirable"] for row in rows]),
        "index": torch.tensor([row["index"] for row in rows]),
    }
