"""Checks that a folder is a valid base model: a complete text language model in floating-point safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svc.errors import BaseModelError, IntegrityError
from svc.files.json_file import read_json_object
from svc.model_folder.weight_files import TOKENIZER_FILES, WEIGHTS_INDEX, weight_files
from trainer.recipe.named_template import SET_TEMPLATE

_WEIGHTS = "model.safetensors"
_FLOATS = {"bfloat16", "float16", "float32"}
_OTHER_MODALITIES = ("vision_config", "audio_config")
_LANGUAGE_MODELS = {
    ("gemma3", "gemma3_text"): "Gemma3ForCausalLM",
    ("mistral3", "mistral"): "MistralForCausalLM",
}
"""Architectures of the language models that can be used without the rest of their checkpoint, keyed by the checkpoint's
`model_type` and the language model's `model_type`."""
_REFUSED = {
    "llama4": "training, merging and serving its mixture of experts are not tested",
    "qwen3_5": "training, merging and serving its linear attention layers are not tested",
    "qwen3_5_moe": "training, merging and serving its linear attention layers and experts are not tested",
}
"""Reasons for rejecting model families, keyed by `model_type`."""
_TEXT_MODELS = (
    "a text-only language model, or a checkpoint whose language model can be used on its own: Gemma 3 or Mistral 3"
)


def check_folder(folder: Path) -> None:
    """Check a base model's file names and configs, without reading its weights.

    Raises:
        BaseModelError: a file is missing, or the model is not supported.
    """
    if not folder.is_dir():
        raise BaseModelError(
            f"the folder {folder} does not exist", todo="check the path; paths in a recipe are relative to the recipe"
        )
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    missing += _missing_weights(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing.append("tokenizer.json")
    if missing:
        raise BaseModelError(
            f"{folder} is missing {', '.join(missing)}",
            expected="a complete language model in transformers format: config, safetensors and tokenizer",
            todo="add the missing files to the folder",
        )
    _check_config(folder, read_json(folder / "config.json"))


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        raise BaseModelError(
            f"{folder} is already quantized",
            expected=f"weights in {', '.join(sorted(_FLOATS))}",
            todo="use the original, unquantized model",
        )
    if not is_text_only(config):
        text_architecture(folder, config)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    architecture = config.get("model_type")
    if architecture not in CONFIG_MAPPING_NAMES:
        raise BaseModelError(
            f"{folder} has model_type {architecture!r}, which transformers does not support",
            expected="an architecture built into transformers, because code from a model's folder is never run",
            todo="choose another base, or update transformers",
        )


def is_text_only(config: Mapping[str, Any]) -> bool:
    """Return whether a model accepts neither images nor audio."""
    return not any(config.get(key) for key in _OTHER_MODALITIES)


def text_architecture(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the architecture of the language model in a checkpoint that also accepts images.

    Args:
        folder: folder of the checkpoint, named in the error message.

    Raises:
        BaseModelError: the language model of this model family cannot be used on its own.
    """
    kind, text = config.get("model_type"), config.get("text_config")
    inner = text.get("model_type") if isinstance(text, dict) else None
    if architecture := _LANGUAGE_MODELS.get((str(kind), str(inner))):
        return architecture
    parts = ", ".join(key for key in _OTHER_MODALITIES if config.get(key))
    reason = _REFUSED.get(
        str(kind), f"extracting the language model from model_type {kind!r} with {inner!r} is not tested"
    )
    raise BaseModelError(
        f"{folder} is not a text-only model (its config has {parts}), and its language model cannot be used on its "
        f"own: {reason}",
        expected=_TEXT_MODELS,
        todo="choose another base",
    )


def _missing_weights(folder: Path) -> list[str]:
    """Return the names of the weight files missing from a folder."""
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            return [path.name for path in weight_files(folder) if not path.is_file()]
        except IntegrityError as error:
            raise BaseModelError(error.wrong, expected=error.expected, todo=error.todo) from error
    names = [path.name for path in weight_files(folder)]
    if _WEIGHTS in names and len(names) > 1:  # vLLM loads all of them, transformers only `_WEIGHTS`
        names.remove(_WEIGHTS)
        raise BaseModelError(
            f"{folder} contains {', '.join(names)} and {_WEIGHTS}, but no {WEIGHTS_INDEX} that says which files "
            "belong to the model",
            expected=f"only {_WEIGHTS}, or several weight files with an index",
            todo=f"move {', '.join(names)} to another folder",
        )
    if _WEIGHTS in names:
        return []
    if names:
        return [WEIGHTS_INDEX]
    if pickles := sorted(file.name for file in folder.glob("*.bin")):
        raise BaseModelError(
            f"{folder} contains its weights only as pickle files: {', '.join(pickles)}",
            expected="*.safetensors, because loading a pickle runs the code in it",
            todo="use a revision with safetensors, or convert the model with its publisher's tools",
        )
    return [_WEIGHTS]


def check_chat_template(folder: Path) -> None:
    """Check that a base model has a chat template.

    Raises:
        BaseModelError: the base model has no chat template.
    """
    if not has_chat_template(folder):
        raise BaseModelError(
            f"{folder} has no chat template",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            todo=SET_TEMPLATE,
        )


def has_chat_template(folder: Path) -> bool:
    """Return whether a model comes with its own chat template."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from one of a base model's files.

    Raises:
        BaseModelError: the file cannot be read, or does not contain a JSON object.
    """
    try:
        return read_json_object(path)
    except IntegrityError as error:
        raise BaseModelError(error.wrong, expected="a JSON object in UTF-8") from error
