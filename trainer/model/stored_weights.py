"""Gives access to the weights in a model folder, keyed by parameter name. Each weight is read from its file
on demand.

No model is loaded, so only the tensors that a caller keeps are in memory. Names and tensors in the files may differ
from the model's: transformers renames some, and joins the experts of a mixture into one parameter. This module calls
the functions of transformers' loader for one parameter at a time. Imports torch and transformers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from svc.errors import IntegrityError
from svc.model_folder.weight_files import weight_files
from trainer.model.layer_shapes import empty_model

Tensors = dict[str, torch.Tensor]


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights in a model folder as bf16 tensors, keyed by parameter name. They are the same as in a model
    loaded from the folder.

    Args:
        folder: folder with a model in safetensors.

    Raises:
        IntegrityError: a tensor of the model is missing from the files.
    """

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = empty_model(folder)
        """The model, built without weights."""
        self._folder = folder
        self._shapes: Tensors = self.model.state_dict()
        self._files = _files_of_tensors(folder)
        conversions = get_model_conversion_mapping(self.model)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        self._converters = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        self._sources: dict[str, list[tuple[str, str | None]]] = {}  # by the first parameter made from the tensors
        for stored in sorted(self._files, key=dot_natural_key):  # the order in which experts are joined
            name, pattern = self._rename(stored, renamings, converters)
            if name in self._shapes:
                self._sources.setdefault(name, []).append((stored, pattern))
        # `save_pretrained` reverts the conversions that loading has used.
        self.model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        self._first_of = {made: first for first in self._sources for made in self._made_of(first)}
        self._ties = self._find_ties()
        if missing := sorted(name for name in self._shapes if self._ties.get(name, name) not in self._first_of):
            raise IntegrityError(
                f"the weights in {folder} are missing {len(missing)} of the model's tensors; the first is "
                f"{missing[0]!r}",
                expected="all weights of the architecture that config.json names",
                todo="download or create the model again",
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.read(name, torch.bfloat16)

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read one parameter from the model's files.

        Args:
            dtype: floating-point type of the result. Integer tensors keep their type.

        Raises:
            IntegrityError: the parameter's shape in the files differs from its shape in the model.
        """
        name = self._ties.get(name, name)
        tensor = self._convert(self._first_of[name], partial(_in_type, dtype))[name]
        if tensor.shape != self._shapes[name].shape:
            raise IntegrityError(
                f"tensor {name!r} in {self._folder} has shape {list(tensor.shape)}",
                expected=f"shape {list(self._shapes[name].shape)}, as implied by config.json",
                todo="download or create the model again",
            )
        return tensor

    def saved_together(self) -> list[list[str]]:
        """Return the parameters that `save_pretrained` writes, in groups that can be written independently of each
        other.

        Tied parameters are excluded. If the files store several parameters as one tensor, all parameters form a
        single group; otherwise every group has one parameter.
        """
        tied_to_another = set(self.model.all_tied_weights_keys) & (set(self._ties) | set(self._ties.values()))
        ignored = self.model._keys_to_ignore_on_save or set()
        names = [name for name in self._shapes if name not in tied_to_another and name not in ignored]
        shapes = {name: self._shapes[name] for name in names}
        apart = [set(self.as_saved({name: shape})) for name, shape in shapes.items()]
        if sum(map(len, apart)) == len(set().union(*apart)) and set().union(*apart) == set(self.as_saved(shapes)):
            return [[name] for name in names]
        return [names]

    def saved_shapes(self) -> Tensors:
        """Return the tensors that `save_pretrained` writes for the model in bf16, keyed by name. They contain no
        data.
        """
        shapes = {name: self._shapes[name] for group in self.saved_together() for name in group}
        complete = {
            name: shape.to(torch.bfloat16) if shape.is_floating_point() else shape for name, shape in shapes.items()
        }
        # Views of a tensor count with the size of the complete tensor.
        return {
            name: torch.empty_like(part, memory_format=torch.contiguous_format)
            for name, part in self.as_saved(complete).items()
        }

    def as_saved(self, tensors: Tensors) -> Tensors:
        """Return parameters as the tensors that `save_pretrained` writes to a file, which may be renamed and split.

        Args:
            tensors: the parameters of complete groups from `saved_together`, keyed by name.
        """
        saved: Tensors = revert_weight_conversion(self.model, tensors)
        return saved

    def _rename(
        self, stored: str, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> tuple[str, str | None]:
        """Return the parameter name and converter pattern for a stored tensor, as
        `convert_and_load_state_dict_in_model` does.
        """
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(stored, renamings, converters, prefix, self._shapes)
        if name not in self._shapes and stored in self._shapes:
            name, pattern = rename_source_key(stored, [], [], prefix, self._shapes)
        return name, pattern

    def _made_of(self, first: str) -> list[str]:
        """Return the names of all parameters created from the same stored tensors as the given parameter."""
        if all(pattern is None for _, pattern in self._sources[first]):
            return [first]
        return list(self._convert(first, _without_weights))

    def _convert(self, first: str, read: Callable[[Any, str], torch.Tensor]) -> Tensors:
        """Return a parameter and all others created from the same stored tensors.

        Args:
            read: returns a tensor of an open file, given its name in the file.
        """
        stored, pattern = self._sources[first][0]
        transform: WeightTransform = deepcopy(self._converters[pattern]) if pattern else WeightRenaming(stored, first)
        with ExitStack() as stack:
            paths = {self._files[stored] for stored, _ in self._sources[first]}
            opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
            for stored, pattern in self._sources[first]:
                transform.add_tensor(first, stored, pattern or stored, read(opened[self._files[stored]], stored))
            converted = transform.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def _find_ties(self) -> dict[str, str]:
        """Map each tied parameter to the parameter whose weights it shares, as transformers ties them after
        loading.

        If the files contain both parameters, they are tied only if they are equal.
        """
        ties = {}
        for target, source in self.model.all_tied_weights_keys.items():
            match target in self._first_of, source in self._first_of:
                case False, True:
                    ties[target] = source
                case True, False:
                    ties[source] = target
                case True, True:
                    both = (self._convert(self._first_of[name], _as_stored)[name] for name in (target, source))
                    if bool(torch.eq(*both).all()):
                        ties[target] = source
        return ties


def _as_stored(file: Any, stored: str) -> torch.Tensor:
    tensor: torch.Tensor = file.get_tensor(stored)
    return tensor


def _without_weights(file: Any, stored: str) -> torch.Tensor:
    return torch.empty(file.get_slice(stored).get_shape(), device="meta")


def _in_type(dtype: torch.dtype, file: Any, stored: str) -> torch.Tensor:
    tensor = _as_stored(file, stored)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            paths |= dict.fromkeys(file.keys(), path)
    return paths
