"""How many tokens an example has for a base model: by its own tokenizer and its own chat template, as training sees it.

The whole conversation is counted, also what a template writes after the last answer (mostly a line end), which training
leaves out.
"""

from pathlib import Path

from svc.chat_template import choose_template_kwargs
from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.example import ChatExample
from svc.errors import DataError


class TokenCounter:
    """Counts by the tokenizer in a model folder.

    Args:
        folder: of the model.

    Raises:
        DataError: it has no tokenizer that can be read, or no chat template.
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
                todo="check the path; without --base lengths are estimated",
            ) from error
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{folder} has no chat template", expected="an instruction-tuned model", todo="choose another base"
            )

        self._template_kwargs = choose_template_kwargs(folder, None)

    def count(self, example: ChatExample) -> int:
        """Tokens of the conversation with its tools.

        Raises:
            RowError: the chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            encoding = self._tokenizer.apply_chat_template(
                **example.templated(), return_dict=True, **self._template_kwargs
            )
        except (TemplateError, TypeError) as error:  # the latter of templates that need tools
            raise RowError(
                Code.TEMPLATE_REFUSES,
                f"the base model's chat template refuses it: {error}",
                expected="turns that the base model knows",
            ) from error
        return len(encoding["input_ids"])
