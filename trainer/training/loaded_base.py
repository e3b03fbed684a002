"""Shares a base model among many training runs in one process. It is read from disk once and never changed.

Imports torch and transformers.
"""

import copy
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.data.chat_template import load_tokenizer
from trainer.model.load import ModelForm, load_model


class LoadedBase:
    """Provides each training run with its own model, so that hooks, adapters and data types are kept
    separate.

    All models share the memory of frozen weights. Trained weights are copied. Quantized weights are copied
    too, because libraries change them when moving them.

    Args:
        folder: folder of the base model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._form: ModelForm | None = None
        self._model: PreTrainedModel | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model."""
        return load_tokenizer(self.folder)

    def load(self, base: Path, form: ModelForm) -> PreTrainedModel:
        """Return a copy of the model that `load_model` returns. The folder is read again only if `form` differs from
        the previous call's `form`.
        """
        if self._model is None or form != self._form:
            self._model, self._form = load_model(base, form), form
        return copy.deepcopy(self._model, {} if form.full else _shared(self._model))


def _shared(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """Map the id of each weight to a new parameter that uses the same memory. The result serves as the memo of
    `deepcopy`.
    """
    return {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
        if type(weight) is torch.nn.Parameter
    }
