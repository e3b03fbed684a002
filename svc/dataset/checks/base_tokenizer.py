"""A base model's tokenizer and chat template, used to look up its special tokens and to count an example's tokens.

The whole conversation is counted, including the template's text after the last answer (usually a newline),
which is excluded from training.
"""

from pathlib import Path

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.example import ChatExample
from svc.errors import DataError
from svc.model_folder.chat_template import choose_template_kwargs


class BaseTokenizer:
    """The tokenizer and chat template in the folder of a model to be trained.

    Attributes:
        special_tokens: special tokens, as strings, that an example should not contain.

    Raises:
        DataError: the folder has no readable tokenizer, or no chat template.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, mistral_format=False
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the tokenizer in {folder}: {error}",
                expected="a model folder",
                todo="check the path, or omit --base to have lengths estimated without a tokenizer",
            ) from error
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{folder} has no chat template",
                expected="an instruction-tuned model",
                todo="omit --base to have lengths estimated without a tokenizer; for svc train, set chat_template in "
                "the recipe",
            )
        self._kwargs = choose_template_kwargs(folder, None)
        added = self._tokenizer.added_tokens_decoder.values()
        self.special_tokens = [token.content for token in added if token.special]

    def count(self, example: ChatExample) -> int:
        """Return the number of tokens in a conversation, including its tool definitions.

        Raises:
            RowError: the chat template rejects the conversation.
        """
        from jinja2 import TemplateError

        try:
            encoding = self._tokenizer.apply_chat_template(**example.templated(), return_dict=True, **self._kwargs)
        except (TemplateError, TypeError) as error:  # TypeError: from templates that need tools
            wrong = f"the base model's chat template rejects the example: {error}"
            expected = "a conversation that the template accepts"
            raise RowError(Code.TEMPLATE_REFUSES, wrong, expected=expected) from error
        return len(encoding["input_ids"])
