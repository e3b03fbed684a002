"""A chat example as token ids: what the model sees, and where its answers are.

The base model's own chat template decides, so that training, calibration and serving see the same text. Knows nothing
of batches or losses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.dataset.schema.example import ChatExample
from svc.errors import BaseModelError, DataError
from svc.terminal import counting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # PyTorch's label for positions that are not scored


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """Token ids of a conversation, up to and with the token that ends its last answer.

    Attributes:
        learnt: start and end of each answer that is learnt, with the token that ends it; the end is exclusive.
    """

    input_ids: list[int]
    learnt: tuple[tuple[int, int], ...]

    def as_row(self) -> dict[str, list[int]]:
        """The trainer's form: labels are the ids in the answers that are learnt, and -100 elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.learnt:
            labels[start:end] = self.input_ids[start:end]
        return {"input_ids": self.input_ids, "labels": labels}


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder.

    Raises:
        BaseModelError: it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        raise BaseModelError(
            f"{folder} has no chat template", expected="an instruction-tuned model", todo="choose another base"
        )
    return tokenizer


def stop_tokens(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    from transformers import GenerationConfig

    ids: set[int | None] = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
        ids |= set(configured) if isinstance(configured, list) else {configured}
    return {token for token in ids if token is not None}


def tokenize_examples(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[ChatExample], stops: set[int]
) -> list[TrainingExample]:
    """Applies the chat template to every example.

    Args:
        stops: ids of the tokens that end an answer.

    Raises:
        DataError: the template refuses an example, as some do with a system turn.
    """
    rows = []
    with counting("Tokenizing", len(examples)) as advance:
        for number, example in enumerate(examples, start=1):
            rows.append(_tokenize(tokenizer, example, stops, number))
            advance()
    return rows


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", example: ChatExample, stops: set[int], number: int
) -> TrainingExample:
    """Templates may put text after the end token, or leave it out: here an answer ends with one in any case."""
    from jinja2 import TemplateError

    try:
        *earlier, last = (_answer(tokenizer, example, turn, stops) for turn in example.learnt)
        if example.learnt[-1] != len(example.messages) - 1:
            earlier.append(last)
            last = _answer(tokenizer, example, len(example.messages) - 1, stops)
    except TemplateError as error:
        raise DataError(
            f"the base model's chat template refuses example {number}: {error}",
            expected="turns that the base model knows",
            todo="change the example's turns, or choose another base",
        ) from error
    spans = []
    for answer in earlier:
        if answer.ids[: answer.end] != last.ids[: answer.end]:
            raise DataError(
                f"in example {number} the chat template writes an earlier answer otherwise than the last one",
                expected="a template that writes a turn the same wherever it stands, to learn more than the last one",
                todo="make an example of each answer, or leave out `weight`",
            )
        spans.append((answer.start, answer.end))
    if example.learnt[-1] == len(example.messages) - 1:
        spans.append((last.start, last.end))
    return TrainingExample(last.ids[: last.end], tuple(spans))


@dataclass(frozen=True, slots=True)
class _Answer:
    """The conversation up to an answer, and where that answer stands."""

    ids: list[int]
    start: int
    end: int


def _answer(tokenizer: "PreTrainedTokenizerBase", example: ChatExample, turn: int, stops: set[int]) -> _Answer:
    ids = _apply_template(tokenizer, example, turn + 1)
    start = _common_prefix(_apply_template(tokenizer, example, turn, add_generation_prompt=True), ids)
    ends = [place for place in range(start, len(ids)) if ids[place] in stops]
    if not ends:
        ids = [*ids, min(stops)]
    return _Answer(ids, start, ends[-1] + 1 if ends else len(ids))


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase", example: ChatExample, turns: int, *, add_generation_prompt: bool = False
) -> list[int]:
    """The first turns of an example, as the engine will write them."""
    encoding: Any = tokenizer.apply_chat_template(
        [message.templated() for message in example.messages[:turns]],
        tools=[json.loads(tool) for tool in example.tools] or None,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
    )
    ids: list[int] = encoding["input_ids"]
    return ids


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
