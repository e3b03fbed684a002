"""A base model that many trainings of one process start from: read from the disk once, and never changed.

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
    """Gives every training a model of its own, with hooks, adapter and types of its own.

    Frozen weights are one memory in all of them; weights that are trained are copied, and so are quantized ones, which
    libraries change when they move them.

    Args:
        folder: of the base model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._form: ModelForm | None = None
        self._model: PreTrainedModel | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's."""
        return load_tokenizer(self.folder)

    def load(self, base: Path, form: ModelForm) -> PreTrainedModel:
        """As trainer.model.load.load_model; reads the folder where it has not yet, or in another form."""
        if self._model is None or form != self._form:
            self._model, self._form = load_model(base, form), form
        return copy.deepcopy(self._model, {} if form.full else _shared(self._model))


def _shared(model: PreTrainedModel) -> dict[int, torch.nn.Parameter]:
    """What a copy takes in place of each weight: another parameter on the same memory."""
    return {
        id(weight): torch.nn.Parameter(weight.data, requires_grad=weight.requires_grad)
        for weight in model.parameters()
        if type(weight) is torch.nn.Parameter
    }
