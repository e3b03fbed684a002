"""Finds an adapter that was trained elsewhere, checks that it fits its base, and copies it into the run in place
of a newly trained one.

PEFT silently ignores tensors that do not fit the model. The names and shapes of all tensors are therefore compared with
the tensors that PEFT itself would write for this base. Only configs and headers are read.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, IntegrityError, RecipeError
from svc.files.json_file import read_json_object
from svc.registry.adapter import CONFIG_FILE, adapter_refusal
from svc.registry.files import read_headers
from trainer.base_model.content import hash_files
from trainer.base_model.hub import fetch_adapter
from trainer.base_model.pypi_wheel import KNOWN
from trainer.recipe.adapter import ADAPTER_TYPES, AdapterType
from trainer.recipe.paths import is_folder
from trainer.recipe.recipe import Recipe

_WEIGHTS_FILE = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MERGED_ONLY: dict[str, Any] = {"use_dora": False, "target_parameters": None}
"""PEFT options that vLLM cannot apply at run time. Adapters with these options can only be served merged. Each option
is mapped to its value in plain LoRA."""


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter that was trained elsewhere.

    Attributes:
        folder: contains adapter_config.json and adapter_model.safetensors.
        origin: its folder or Hub id, as specified by the user.
        config: contents of adapter_config.json.
        digest: hash of both files, as `sha256:<hex>`.
    """

    folder: Path
    origin: str
    config: Mapping[str, Any]
    digest: str

    @property
    def base(self) -> str | None:
        """The base model id in the adapter's config, or None if the config contains a path, which may be valid only on
        another machine.
        """
        named = str(self.config.get("base_model_name_or_path") or "")
        return named if named in KNOWN or _HUB_ID.fullmatch(named) else None

    def check_base(self, base: str) -> str | None:
        """Return a warning if the adapter's config names a base other than `base`, or None otherwise."""
        named = self.config.get("base_model_name_or_path")
        if not named or named == base:
            return None
        return (
            f"the adapter names the base {named}, but the version is based on {base}: the names and shapes of "
            "the tensors are checked, but not whether both bases have the same weights"
        )

    @property
    def parts(self) -> tuple["TrainedAdapter", ...]:
        """The adapters that must be checked against the base: only this one."""
        return (self,)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the adapter changes."""
        names = {tensor.name.partition(".lora_")[0] for tensor in read_headers(self.folder)}
        return sorted(name.removeprefix("base_model.model.") for name in names)

    def warnings(self, base: str) -> list[str]:
        """Return warnings if the adapter's config names a base other than `base`, or if the adapter can only be served
        merged.
        """
        return [warning for warning in (self.check_base(base), merged_only(self.config)) if warning]

    def describe(self, recipe: Recipe) -> Recipe:
        """Return a recipe completed with the adapter's type, rank, alpha and layers.

        Raises:
            RecipeError: the recipe has a different value for one of these keys.
        """
        return complete_recipe(recipe, self._recipe_values(), f"adapter {self.origin}")

    def _recipe_values(self) -> dict[str, Any]:
        return {
            "adapter.type": AdapterType.DORA if self.config.get("use_dora") else AdapterType.LORA,
            "adapter.rank": self.config["r"],
            "adapter.alpha": self.config["lora_alpha"],
            "adapter.rslora": bool(self.config.get("use_rslora")),
            "adapter.targets": tuple(sorted({layer.rpartition(".")[2] for layer in self.layers})),
        }

    def copy_to(self, out: Path, base: Path) -> None:
        """Copy the adapter to a new folder. In the copy's config, the base is set to the given folder, and a pattern
        that selects layers is replaced with a list of layer names, because an engine needs a local base and explicit
        names.
        """
        out.mkdir(parents=True)
        shutil.copyfile(self.folder / _WEIGHTS_FILE, out / _WEIGHTS_FILE)
        config = dict(self.config) | {"base_model_name_or_path": str(base)}
        if not isinstance(config.get("target_modules"), list):
            config["target_modules"] = self.layers
        (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def complete_recipe(recipe: Recipe, values: Mapping[str, Any], adapter: str) -> Recipe:
    """Return a recipe completed with the values of an existing adapter.

    Args:
        values: values of the `adapter` section, keyed by dotted key.
        adapter: description of the adapter for error messages.

    Raises:
        RecipeError: the recipe sets one of these keys, or `method`, to a different value.
    """
    implied = ADAPTER_TYPES[recipe.method]
    if "method" in recipe.model_fields_set and implied is not values["adapter.type"]:
        raise RecipeError(
            f"method is {recipe.method}, but {adapter} is {values['adapter.type']}",
            todo="remove `method` from the recipe",
        )
    for key, value in values.items():
        name = key.removeprefix("adapter.")
        given = getattr(recipe.adapter, name)
        if name in recipe.adapter.model_fields_set and given != value:
            raise RecipeError(f"{key} is {given}, but {adapter} has {value}", todo=f"remove {key} from the recipe")
    return recipe.changed(values)


def find_adapter(name: str, cache: Path) -> TrainedAdapter:
    """Return the adapter in a folder or on the Hugging Face Hub.

    Args:
        name: a folder (`./name`) or a Hub id (`org/name`).
        cache: folder for downloads.

    Raises:
        BaseModelError: the adapter does not exist, is not in safetensors format, or is of an unsupported kind.
        IntegrityError: a file is damaged.
    """
    folder = Path(name).expanduser() if is_folder(name) else fetch_adapter(name, cache)
    if not (folder / CONFIG_FILE).is_file():
        raise BaseModelError(
            f"{name} has no {CONFIG_FILE}",
            expected=f"an adapter saved by PEFT: {CONFIG_FILE} and {_WEIGHTS_FILE}",
            todo="check the path or Hub id; a complete model is a base, not an adapter",
        )
    config = read_json_object(folder / CONFIG_FILE)
    if reason := refusal(config):
        raise BaseModelError(
            f"{name} cannot be imported: {reason}",
            expected="a LoRA, rsLoRA or DoRA adapter for a causal language model",
            todo="merge the adapter in the program that trained it, and use the merged model as a base",
        )
    if not (folder / _WEIGHTS_FILE).is_file():
        pickled = " (only adapter_model.bin, a pickle file, which can run code)"
        raise BaseModelError(
            f"{name} has no {_WEIGHTS_FILE}{pickled if (folder / 'adapter_model.bin').exists() else ''}",
            expected="weights in safetensors, not in a pickle file such as adapter_model.bin",
            todo="save the adapter again with PEFT's save_pretrained(..., safe_serialization=True)",
        )
    return TrainedAdapter(
        folder.absolute(), name, config, hash_files([folder / CONFIG_FILE, folder / _WEIGHTS_FILE], "the adapter")
    )


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return the reason why an adapter cannot become a version, or None if it can.

    Args:
        config: contents of adapter_config.json, as PEFT wrote it.
    """
    targets = config.get("target_modules")
    merged = dict(config) | _MERGED_ONLY | {"target_modules": targets if isinstance(targets, list) else []}
    if reason := adapter_refusal(merged):
        return reason
    if (task := config.get("task_type")) not in (None, "CAUSAL_LM"):
        return f"its task_type is {task}"
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int) or alpha < 1:
        return f"its lora_alpha is {alpha!r}, which is not a positive whole number"
    return None


def merged_only(config: Mapping[str, Any]) -> str | None:
    """Return a warning if an adapter can only be served merged, or None if vLLM can apply it at run time."""
    listed = config if isinstance(config.get("target_modules"), list) else dict(config) | {"target_modules": []}
    reason = adapter_refusal(listed)
    return f"the version can only be served merged, not with --format adapter: {reason}" if reason else None


def check_fits(model: Path, adapter: TrainedAdapter) -> None:
    """Check that an adapter has exactly the tensors that PEFT would save for this base.

    Args:
        model: folder with the base's config.json. Weights are not read.

    Raises:
        BaseModelError: a tensor is missing, unexpected, or has the wrong shape; the message names the first such
            tensor.
    """
    saved = {tensor.name: tensor.shape for tensor in read_headers(adapter.folder)}
    expected = _expected_shapes(model, adapter)
    problems = [
        *(
            f"has tensor {name}, which belongs to no layer of this base"
            for name in sorted(saved.keys() - expected.keys())
        ),
        *(f"lacks tensor {name}" for name in sorted(expected.keys() - saved.keys())),
        *(
            f"has tensor {name} of shape {list(saved[name])}, but this base needs {list(expected[name])}"
            for name in sorted(saved.keys() & expected.keys())
            if saved[name] != expected[name]
        ),
    ]
    if problems:
        raise _does_not_fit(adapter, problems[0])


def _expected_shapes(model: Path, adapter: TrainedAdapter) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that PEFT would save for this base and config, keyed by name."""
    from trainer.library_output import library_output_to_log

    with library_output_to_log():
        from trainer.model.layer_shapes import empty_model
        from trainer.model.peft_config import adapter_shapes

        try:
            return adapter_shapes(empty_model(model), adapter.folder)
        except ValueError as error:  # PEFT finds no layer, or a layer of another kind
            raise _does_not_fit(adapter, f"cannot be added to it: {error}") from error
        except TypeError as error:
            raise IntegrityError(f"PEFT cannot read {adapter.folder / CONFIG_FILE}: {error}") from error


def _does_not_fit(adapter: TrainedAdapter, problem: str) -> BaseModelError:
    named = adapter.config.get("base_model_name_or_path")
    return BaseModelError(
        f"adapter {adapter.origin} does not fit the base: it {problem}",
        expected=f"the base that the adapter was trained on: {named or 'unknown, because its config names none'}",
        todo="set --base to the base that the adapter was trained on",
    )
