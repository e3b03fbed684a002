"""Builds tokenizers with the chat template of a family."""

from functools import cache
from importlib.resources import files

from transformers import PreTrainedTokenizerFast

from tests.trainer.conftest import make_tokenizer


def source(family: str) -> str:
    """Return the chat template that TRL publishes for a family."""
    return files("trl.chat_templates").joinpath(f"{family}.jinja").read_text("utf-8")


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the chat template of a family."""
    tokenizer = make_tokenizer(source(family))
    tokenizer.bos_token = "<bos>"
    return tokenizer
