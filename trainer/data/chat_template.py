"""Converts a chat example to token ids, with the positions of its answers.

The base model's own chat template is used, so that training, calibration and serving see the same text. In serving, the
engine renders the prompt and the model continues it. Each answer is therefore trained as a continuation of the prompt
that the engine renders for it, even if the template renders the complete conversation differently. If the template
renders an earlier answer differently in the prompt of a later answer, as Qwen3's does by omitting earlier thinking, the
example is split into several rows. A template is rejected if it makes the model think, or write any other text, before
the answer, because examples that contain only answers cannot teach this. This module is independent of batches and
losses.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.dataset.text.thinking import CLOSING
from svc.errors import BaseModelError, DataError
from svc.files.json_file import read_json_object
from svc.imports import without_garbage_collection
from svc.model_folder.chat_template import TemplateKwargs, pin_date
from svc.terminal import counting
from trainer.recipe.named_template import SET_TEMPLATE, NamedTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # PyTorch's label for positions that are not scored
_MAX_SHOWN = 60
_MARK = "\u241f"  # Unicode's symbol for a separator; replaces an answer to find its position in the template's text
_THINKS = re.compile(r"<\|?(start_)?think(ing)?\|?>\s*$", re.IGNORECASE)
"""Matches a prompt that makes the model think before it answers."""


def training_row(example: TokenizedExample) -> dict[str, list[int]]:
    """Return an example in the form that the trainer expects. Labels are the token ids of answers that are trained on,
    and -100 everywhere else.
    """
    ids = list(example.input_ids)
    labels = [IGNORED] * len(ids)
    for start, end in example.learnt:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder, including its chat template, without running code from the folder.

    Raises:
        BaseModelError: transformers cannot read the tokenizer, or it has no chat template.
    """
    tokenizer = read_tokenizer(folder)
    if not tokenizer.chat_template:
        raise BaseModelError(f"{folder} has no chat template", expected="an instruction-tuned model", todo=SET_TEMPLATE)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = pin_date(tokenizer.chat_template)
    return tokenizer


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder that may have no chat template, without running code from the
    folder.

    Raises:
        BaseModelError: transformers cannot read the tokenizer.
    """
    with without_garbage_collection():
        from transformers import AutoTokenizer

    try:
        # With mistral_common installed, transformers would prefer the folder's tekken.json, which has no chat template;
        # the engine reads tokenizer.json too.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, mistral_format=False
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise BaseModelError(
            f"transformers cannot read the tokenizer in {folder}: {error}",
            expected="a tokenizer that transformers supports without custom code",
            todo="download the model's tokenizer files again, or choose another base",
        ) from error
    return tokenizer


def stop_tokens(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Return the ids of the tokens at which the engine stops an answer.

    These are the tokenizer's end token and the end tokens in generation_config.json, or in config.json if that file is
    missing.
    """
    name = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
    configured = read_json_object(folder / name).get("eos_token_id")
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return {token for token in ids if token is not None}


def check_ending(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", stops: set[int], template_kwargs: TemplateKwargs
) -> None:
    """Check that no chat template text reaches the client after an answer.

    A tokenizer may treat the template's end-of-turn marker as ordinary text, as Llama 2's does with `<|im_end|>`, so
    the engine would not stop there.

    Args:
        folder: folder of the model, named in the error message.
        stops: ids of the tokens at which the engine stops.

    Raises:
        BaseModelError: the template puts text between an answer and the first stop token.
    """
    from jinja2 import TemplateError

    example = ChatExample((Message(Role.USER, "?"), Message(Role.ASSISTANT, _MARK)))
    conversation = _Conversation(tokenizer, template_kwargs, stops, example, 1)
    try:
        _, answer, end = conversation.text(2).rpartition(_MARK)
    except (TemplateError, TypeError):  # tokenizing the examples shows whether the template rejects these, too
        return
    learnt = list(takewhile(lambda token: token not in stops, conversation.ids(end)))
    shown = str(tokenizer.decode(learnt, skip_special_tokens=True)).strip()
    if answer and shown:
        tokens = ", ".join(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(stops)))
        raise BaseModelError(
            f"the chat template of {folder} ends an answer with {shown!r}, which the tokenizer treats as ordinary "
            "text: the engine would not stop there, and clients would see the text",
            expected=f"a template that ends an answer with a token at which the engine stops: {tokens}",
            todo=f"replace that text with {{{{ eos_token }}}}, or set chat_template in the recipe to one of "
            f"{', '.join(NamedTemplate)}",
        )


def tokenize_turns(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[ChatExample],
    stops: set[int],
    template_kwargs: TemplateKwargs,
) -> list[list[TokenizedExample]]:
    """Tokenize each example into one or more rows that contain the answers to train on.

    An example becomes a single row if the template renders earlier turns identically in every later prompt.

    Args:
        stops: ids of the tokens that end an answer.
        template_kwargs: arguments of the template (see
            svc.model_folder.chat_template.choose_template_kwargs).

    Raises:
        DataError: the template rejects an example, as some templates reject system turns, or the training text would
            differ from the answer in serving.
    """
    return list(iterate_turns(tokenizer, examples, stops, template_kwargs))


def iterate_turns(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[ChatExample],
    stops: set[int],
    template_kwargs: TemplateKwargs,
) -> Iterator[list[TokenizedExample]]:
    """Yield each example's rows as one list, in the order of the examples (see `tokenize_turns`)."""
    for conversation in _conversations(tokenizer, examples, stops, template_kwargs):
        yield conversation.rows(conversation.example.learnt)


def tokenize_examples(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[ChatExample],
    stops: set[int],
    template_kwargs: TemplateKwargs,
) -> list[TokenizedExample]:
    """Return each example's final answer, tokenized after its prompt, for evaluation (see `tokenize_turns`).

    The answer is tokenized as in training, and is included even if the example's weights exclude it from training.
    """
    conversations = _conversations(tokenizer, examples, stops, template_kwargs)
    return [conversation.rows([len(conversation.example.messages) - 1])[0] for conversation in conversations]


def tokenize_turns_of(
    folder: Path, examples: Sequence[ChatExample], template_kwargs: TemplateKwargs
) -> list[list[TokenizedExample]]:
    """Tokenize training examples with the tokenizer of a model folder (see `load_tokenizer` and
    `tokenize_turns`).
    """
    tokenizer = load_tokenizer(folder)
    return tokenize_turns(tokenizer, examples, stop_tokens(folder, tokenizer), template_kwargs)


def tokenize_as_trained(
    folder: Path, examples: Sequence[ChatExample], template_kwargs: TemplateKwargs
) -> list[TokenizedExample]:
    """Tokenize final answers with the tokenizer of a model folder, as in training (see `load_tokenizer` and
    `tokenize_examples`).
    """
    tokenizer = load_tokenizer(folder)
    return tokenize_examples(tokenizer, examples, stop_tokens(folder, tokenizer), template_kwargs)


@dataclass(frozen=True, slots=True)
class _Conversation:
    """An example rendered with a base model's chat template.

    Attributes:
        number: number of the example, for error messages.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: TemplateKwargs
    stops: set[int]
    example: ChatExample
    number: int

    def rows(self, turns: Iterable[int]) -> list[TokenizedExample]:
        """Return training rows for the given answers, each tokenized after the prompt that the engine renders for
        it.

        An answer is appended to the preceding row if its prompt begins with that row. Every answer ends with an
        end token, even if the template omits the token or puts text after it.
        """
        from jinja2 import TemplateError

        rows: list[TokenizedExample] = []
        for turn in turns:
            try:
                row = self._row(turn)
            except (TemplateError, TypeError) as error:  # templates that need tools raise TypeError
                raise DataError(
                    f"the base model's chat template rejects example {self.number}: {error}",
                    expected="a conversation that the template accepts",
                    todo="change the example's turns, or choose another base",
                ) from error
            if rows and row.input_ids[: len(rows[-1].input_ids)] == rows[-1].input_ids:
                row = replace(row, learnt=(*rows.pop().learnt, *row.learnt))
            rows.append(row)
        return rows

    def _row(self, turn: int) -> TokenizedExample:
        prompt = self.text(turn, add_generation_prompt=True)
        learnt = self._after_prompt(turn, prompt)
        before, ids = self.ids(prompt), self.ids(prompt + learnt)
        start = len(before)
        if ids[:start] != before:  # a token crosses the boundary of prompt and answer, which never happens in serving
            ids = [*before, *self.ids(learnt)]
        ends = [index + 1 for index in range(start, len(ids)) if ids[index] in self.stops]
        ids = ids[: ends[-1]] if ends else [*ids, min(self.stops)]
        return TokenizedExample(tuple(ids), ((start, len(ids)),))

    def _after_prompt(self, turn: int, prompt: str) -> str:
        """Return the text that the template renders after the prompt: the answer and whatever ends it.

        Raises:
            DataError: this text differs from the example's answer, so the model would learn the wrong answer.
        """
        message, conversation = self.example.messages[turn], self.text(turn + 1)
        todo = "set chat_template_kwargs in the recipe to the arguments that the template needs, or choose another base"
        if turn < len(self.example.messages) - 1:
            todo += ", or set data.learn: last to learn only the final answers"
        if conversation.startswith(prompt):
            learnt = conversation[len(prompt) :]
        else:
            # The prompt may end with a closed block of thoughts, or have the system turn at another position.
            plain = replace(message, content=_MARK, tool_calls=())
            marked = replace(self.example, messages=(*self.example.messages[:turn], plain))
            before, *others = replace(self, example=marked).text(turn + 1).split(_MARK)
            if len(others) != 1 or not conversation.startswith(before) or _THINKS.search(prompt):
                common = _common_prefix(prompt, conversation)
                in_conversation, in_prompt = (text[common : common + _MAX_SHOWN] for text in (conversation, prompt))
                raise DataError(
                    f"example {self.number}: the base model's chat template renders the prompt differently as part "
                    f"of the whole conversation: after a common prefix, the conversation has {in_conversation!r} where "
                    f"the prompt has {in_prompt!r}",
                    expected="a template that renders a prompt the same way alone and as part of a conversation",
                    todo=todo,
                )
            learnt = conversation[len(before) :]
        if message.reasoning is not None:
            thinks = _squeezed(message.reasoning + CLOSING + message.content)
            if not _squeezed(learnt).removeprefix("<think>").startswith(thinks):
                raise DataError(
                    f"in example {self.number}, the model would learn {learnt[:_MAX_SHOWN]!r} instead of the turn's "
                    f"reasoning_content {message.reasoning[:_MAX_SHOWN]!r} followed by {CLOSING} and the "
                    "rest of the answer",
                    expected=f"a template that renders reasoning_content and {CLOSING} before the answer",
                    todo="set chat_template_kwargs in the recipe (for example, enable_thinking: true), choose another "
                    "base, or remove reasoning_content",
                )
        if message.tool_calls:  # templates render them in their own form
            after = learnt.replace(message.content, "", 1)  # a tool's name may be a word of the text
            if missing := [call.name for call in message.tool_calls if call.name not in after]:
                raise DataError(
                    f"in example {self.number}, the model would learn {learnt[:_MAX_SHOWN]!r} instead of a call to the "
                    f"tool {missing[0]!r}",
                    expected="a chat template that renders tool calls",
                    todo="choose another base, set chat_template in the recipe to a file, or remove the example",
                )
        elif message.reasoning is None and not _squeezed(learnt).startswith(_squeezed(message.content)):
            raise DataError(
                f"in example {self.number}, the model would learn {learnt[:_MAX_SHOWN]!r}, but the answer is "
                f"{message.content[:_MAX_SHOWN]!r}",
                expected="a template that renders the answer directly after the prompt",
                todo=todo,
            )
        return learnt

    def text(self, turns: int, *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation's first turns as the engine renders it."""
        arguments = self.example.templated(turns)
        text = self.tokenizer.apply_chat_template(
            **arguments, tokenize=False, add_generation_prompt=add_generation_prompt, **self.kwargs
        )
        return str(text)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of rendered template text, which already contains its special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _conversations(
    tokenizer: "PreTrainedTokenizerBase", examples: Sequence[ChatExample], stops: set[int], kwargs: TemplateKwargs
) -> Iterator[_Conversation]:
    """Yield the conversation of each example while showing progress."""
    with counting("Tokenizing", len(examples)) as advance:
        for number, example in enumerate(examples, start=1):
            yield _Conversation(tokenizer, kwargs, stops, example, number)
            advance()


def _squeezed(text: str) -> str:
    """Remove all whitespace from a text."""
    return "".join(text.split())


def _common_prefix(first: str, second: str) -> int:
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
