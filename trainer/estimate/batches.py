"""The batches of a training run, which determine how much memory and time it needs.

The batches are formed as in the trainer, from the real example lengths, so padding, grouping by length and shared
prompts are all taken into account. Without the base's tokenizer, texts are cut into pieces of 4.2 characters, the
average token length in English text; other languages and code need more tokens.
"""

import heapq
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.model_folder.chat_template import choose_template_kwargs
from svc.model_folder.weight_files import TOKENIZER_FILES
from trainer.data.chat_template import IGNORED, tokenize_as_trained, tokenize_turns_of, training_row
from trainer.data.length import cut_documents, truncate
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import TooLong, Train
from trainer.training.parallel.devices import share_of

CHARACTERS_A_TOKEN = 4.2
_TURN = 5
"""Number of tokens that a chat template adds to each turn."""
_MAX_EXAMPLES = 1000
"""Maximum number of examples to measure. Larger data sets are sampled."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Dimensions of a batch of examples, which the model processes together.

    Attributes:
        rows: number of examples.
        length: number of tokens in the longest example.
        shared: number of tokens in the prefix that all examples share, which is computed once.
        answers: number of tokens that are trained on.
        sequences: number of sequences per example, which is 2 for a pair of answers.
    """

    rows: int
    length: int
    shared: int
    answers: int
    sequences: int = 1

    @property
    def computed(self) -> int:
        """Number of tokens that the model processes, counting the shared prefix once."""
        return self.shared + self.rows * self.sequences * (self.length - self.shared)

    def resized(self, rows: int) -> "Batch":
        """Return the batch with a different number of examples, for estimating its memory."""
        answers = math.ceil(self.answers * rows / self.rows)
        shared = self.shared if rows * self.sequences > 1 else 0
        return replace(self, rows=rows, shared=shared, answers=answers)

    def shortened(self, longest: int) -> "Batch":
        """Return the batch truncated to the given length, for estimating its memory."""
        length = min(self.length, longest)
        answers = min(self.answers, self.rows * self.sequences * length)
        return replace(self, length=length, shared=min(self.shared, length), answers=answers)


@dataclass(frozen=True)
class Workload:
    """All batches of a training run.

    Attributes:
        examples: number of training examples.
        mean_length: mean number of tokens in an example, or in its longest row if the chat template splits
            it.
        tokens: number of tokens in one epoch, without padding.
        batches: batches of one epoch, or of a sample of its examples.
        repeats: how many times the complete run processes `batches`.
        largest: the batch that needs the most memory.
        counted: whether tokens were counted with the base's own tokenizer.
        scored: how many times the complete run processes `batches` without a backward pass.
    """

    examples: int
    mean_length: float
    tokens: float
    batches: tuple[Batch, ...]
    repeats: float
    largest: Batch
    counted: bool
    scored: float = 0.0


def read_workload(
    examples: Sequence[ChatExample] | Sequence[PreferencePair | LabeledAnswer], recipe: Recipe, folder: Path
) -> Workload:
    """Return the batches that a recipe's training run would form from the given examples.

    If a preference objective needs a reference model, all answers are scored once before training. With `objective:
    kto`, each labeled answer is also compared with an answer to a different prompt. These mismatched answers are scored
    too, and are assumed to be as long as the labeled answers.

    Args:
        folder: the base's folder. If it contains no tokenizer, the numbers of tokens are estimated.

    Raises:
        DataError: the chat template rejects an example.
    """
    train, counted = recipe.train, any((folder / name).is_file() for name in TOKENIZER_FILES)
    chosen = np.random.default_rng(recipe.data.seed).permutation(len(examples))[:_MAX_EXAMPLES]
    measured = _tokenize([examples[index] for index in sorted(chosen)], folder, recipe, counted=counted)
    rows, units, times = list(chain.from_iterable(measured)), _units(measured, recipe), len(examples) / len(measured)
    in_rows = sum(map(_length, rows))
    tokens, mean_length = in_rows * times, fmean(map(_longest, measured))
    if train.packing:
        learnt = train.batch_size * train.max_length * (sum(row.scored for row in rows) / in_rows)
        largest = Batch(train.batch_size, train.max_length, 0, math.ceil(learnt))
        batches, in_epoch = [largest], max(1, math.ceil(tokens / train.max_length)) / train.batch_size
    else:
        batches, in_epoch = _plan(units, train), math.ceil(len(units) * times / train.batch_size)
        candidates = batches
        if len(measured) < len(examples):  # the largest batch may be that of the longest examples
            longest = heapq.nlargest(train.batch_size, examples, key=_characters)
            units = _units(_tokenize(longest, folder, recipe, counted=counted), recipe)
            candidates = [*batches, _measure(sorted(units, key=_longest)[-train.batch_size :])]
        largest = max(candidates, key=lambda batch: batch.computed)
    in_run = train.steps * train.gradient_accumulation if train.steps else train.epochs * in_epoch
    scored = float(in_epoch if recipe.objective.needs_reference else 0)
    if recipe.objective is Objective.KTO:
        scored = 2 * in_epoch + in_run
    number = len(batches)
    return Workload(
        len(examples), mean_length, tokens, tuple(batches), in_run / number, largest, counted, scored / number
    )


def shared_out(recipe: Recipe, workload: Workload, devices: int) -> tuple[Recipe, Workload]:
    """Return the recipe and the workload of each device when a run is divided among several devices.

    Raises:
        RecipeError: a step cannot be divided among the devices.
    """
    if devices == 1:
        return recipe, workload
    train, share = recipe.train, share_of(recipe.train, devices)
    batches = tuple(
        batch.resized(math.ceil(batch.rows * share.batch_size / train.batch_size)) for batch in workload.batches
    )
    part = replace(
        workload,
        batches=batches,
        repeats=workload.repeats * share.accumulation / train.gradient_accumulation,
        largest=workload.largest.resized(share.batch_size),
    )
    sizes = {"batch_size": share.batch_size, "gradient_accumulation": share.accumulation}
    return recipe.model_copy(update={"train": train.model_copy(update=sizes)}), part


def unshared(workload: Workload) -> Workload:
    """Return a copy of the workload whose batches have no shared prefixes."""
    batches = tuple(replace(batch, shared=0) for batch in workload.batches)
    return replace(workload, batches=batches, largest=replace(workload.largest, shared=0))


def plan_batches(rows: Sequence[TokenizedExample], train: Train) -> list[Batch]:
    """Return the trainer's batches in the first epoch, before gradient accumulation combines them."""
    return _plan([[row] for row in rows], train)


def _units(measured: list[list[TokenizedExample]], recipe: Recipe) -> list[list[TokenizedExample]]:
    """Return the rows that stay in the same batch: the two answers of a pair, or else a single row."""
    return measured if recipe.objective.is_preference else [[row] for row in chain.from_iterable(measured)]


def _plan(units: list[list[TokenizedExample]], train: Train) -> list[Batch]:
    from trainer.data.length_grouped_sampler import LengthGroupedSampler

    size, step = train.batch_size, train.batch_size * train.gradient_accumulation
    order = list(LengthGroupedSampler(list(map(_longest, units)), step, train.seed))
    return [_measure([units[index] for index in order[start : start + size]]) for start in range(0, len(order), size)]


def _measure(units: list[list[TokenizedExample]]) -> Batch:
    return measure_batch(list(chain.from_iterable(units)), sequences=len(units[0]))


def measure_batch(rows: Sequence[TokenizedExample], sequences: int = 1) -> Batch:
    """Return the dimensions of a batch that consists of the given rows, padded to the longest row.

    Args:
        sequences: number of rows that belong to one example.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from trainer.training.loss import shared_prefix

    training_rows = [training_row(row) for row in rows]
    ids, labels = (
        pad_sequence([torch.tensor(row[key]) for row in training_rows], batch_first=True, padding_value=padding)
        for key, padding in (("input_ids", 0), ("labels", IGNORED))
    )
    shared, answers = shared_prefix(ids, labels), int((labels != IGNORED).sum())
    return Batch(len(training_rows) // sequences, ids.shape[1], shared, answers, sequences)


def _tokenize(
    examples: Sequence[ChatExample | PreferencePair | LabeledAnswer], folder: Path, recipe: Recipe, *, counted: bool
) -> list[list[TokenizedExample]]:
    """Return the tokenized rows of each example, truncated to the maximum length: two for a pair of answers, one for a
    labeled answer. Examples that the recipe drops as too long are excluded.
    """

    def tokenize(chats: Sequence[ChatExample]) -> list[list[TokenizedExample]]:
        if not counted:
            return [[cut_into_pieces(chat)] for chat in chats]
        kwargs = choose_template_kwargs(folder, recipe.chat_template_kwargs)
        if recipe.objective.is_preference:
            return [[row] for row in tokenize_as_trained(folder, chats, kwargs)]
        return tokenize_turns_of(folder, chats, kwargs)

    answers = zip(*map(_chats, examples), strict=True)  # all better answers, then all worse ones
    tokenized = [list(chain.from_iterable(parts)) for parts in zip(*map(tokenize, answers), strict=True)]
    if recipe.objective is Objective.TEXT:
        tokenized = list(cut_documents(tokenized, recipe.train.max_length))
    longest, drops = recipe.train.max_length, recipe.train.too_long is TooLong.DROP
    fitting = [rows for rows in tokenized if not drops or _longest(rows) <= longest]
    return [[truncate(row, longest) for row in rows] for rows in fitting or tokenized]


def _chats(example: ChatExample | PreferencePair | LabeledAnswer) -> tuple[ChatExample, ...]:
    match example:
        case PreferencePair(chosen, rejected):
            return chosen, rejected
        case LabeledAnswer(answer):
            return (answer,)
    return (example,)


def _characters(example: ChatExample | PreferencePair | LabeledAnswer) -> int:
    return max(chat.characters for chat in _chats(example))


def cut_into_pieces(example: ChatExample) -> TokenizedExample:
    """Split an example into pieces that stand in for tokens. Texts with a common prefix get the same leading
    pieces.
    """
    ids: list[int] = []
    learnt = []
    for turn, message in enumerate(example.messages):
        ids += [-1] * _TURN
        start = len(ids)
        text = (message.reasoning or "") + message.content + "".join(str(call) for call in message.tool_calls or ())
        pieces = math.ceil(len(text) / CHARACTERS_A_TOKEN)
        cuts = [math.ceil(number * CHARACTERS_A_TOKEN) for number in range(pieces + 1)]
        ids += [zlib.crc32(text[cuts[number] : cuts[number + 1]].encode("utf-8")) for number in range(pieces)]
        if turn in example.learnt:
            learnt.append((start, len(ids)))
    return TokenizedExample(tuple(ids), tuple(learnt))


def _length(row: TokenizedExample) -> int:
    return len(row.input_ids)


def _longest(rows: Sequence[TokenizedExample]) -> int:
    return max(map(_length, rows))
