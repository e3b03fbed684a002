"""A base model shared by many trainings in one process, read from disk once and never changed.

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
    """Provides each training with its own model, so that hooks, adapter and types are separate.

    All models share the memory of frozen weights. Trained weights are copied, and so are quantized ones,
    which libraries change when they move them.

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
        """Return a copy of the model, like trainer.model.load.load_model. The folder is read once per form."""
        if self._model is None or form != self._form:
            self._model, self._form = load_model(base, form), form
        return copy.deepcopy(self._model, {} if form.full else _shared(self._model))


def _shared(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """Map each weight to a new parameter on the same memory, for use as `deepcopy`'s memo."""
    return {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
        if type(weight) is torch.nn.Parameter
    }
