"""A chat example as token ids: what the model sees, and where the answer starts.

The base model's own chat template decides, so that training, calibration and serving see the same text. Knows nothing
of batches or losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from svc.dataset.example import ChatExample
from svc.errors import BaseModelError, DataError
from svc.terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # PyTorch's label for positions that are not scored


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """Token ids of a conversation, up to and with the token that ends the answer."""

    input_ids: list[int]
    answer_start: int

    def as_row(self) -> dict[str, list[int]]:
        """The trainer's form: labels are the ids in the answer, and -100 before it."""
        return {
            "input_ids": self.input_ids,
            "labels": [IGNORED] * self.answer_start + self.input_ids[self.answer_start :],
        }


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
    numbered = track(enumerate(examples, start=1), "Tokenizing", total=len(examples), console=console, transient=True)
    return [_tokenize(tokenizer, example, stops, number) for number, example in numbered]


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", example: ChatExample, stops: set[int], number: int
) -> TrainingExample:
    """Templates may put text after the end token, or leave it out: here the answer ends with one in any case."""
    from jinja2 import TemplateError

    messages = example.as_dict()["messages"]
    try:
        whole = _apply_template(tokenizer, messages)
        prompt = _apply_template(tokenizer, messages[:-1], add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"the base model's chat template refuses example {number}: {error}",
            expected="turns that the base model knows",
            todo="change the example's turns, or choose another base",
        ) from error
    start = _common_prefix(prompt, whole)
    ends = [place for place in range(start, len(whole)) if whole[place] in stops]
    ids = whole[: ends[-1] + 1] if ends else [*whole, min(stops)]
    return TrainingExample(ids, start)


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    ids: list[int] = encoding["input_ids"]
    return ids


def _common_prefix(one: list[int], other: list[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
