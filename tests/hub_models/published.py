"""Builds model folders from a publisher's metadata files, unchanged except for the sizes in config.json.

The files are not part of the project. A folder of them, ORG__MODEL, contains config.json and, where
available, generation_config.json, tokenizer_config.json, special_tokens_map.json and chat templates.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tests.hub_models.build import write_weights
from tests.hub_models.family import FAMILIES, Vocabulary
from tests.hub_models.tokenizer import write_with_special_tokens

_LAYERS, _HEADS, _HEAD_WIDTH = 6, 4, 32  # Gemma 3 attends to everything in every sixth layer
_SIZES = {
    "hidden_size": _HEADS * _HEAD_WIDTH,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "head_dim": _HEAD_WIDTH,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_LISTS = {
    "layer_types": _LAYERS,
    "no_rope_layers": _LAYERS,
    "long_factor": _HEAD_WIDTH // 2,
    "short_factor": _HEAD_WIDTH // 2,
}
NO_TEMPLATE = "has no chat template"
_OTHER_CONTENT = ("vision_config", "audio_config")
_WITH_LANGUAGE_MODEL = ("gemma3", "mistral3")
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "GemmaTokenizer")
_FIRST_FREE_ID = {Vocabulary.SMOLLM2: 49152, Vocabulary.MISTRAL_1: 32000, Vocabulary.MISTRAL_3: 32768}
_RESERVED = {Vocabulary.SMOLLM2: 17, Vocabulary.MISTRAL_1: 3, Vocabulary.MISTRAL_3: 771}


def refusal(published: Path) -> str | None:
    """Return why a model cannot be a base, judging only by its publisher's files, or None if it can."""
    from transformers import CONFIG_MAPPING

    config = json.loads((published / "config.json").read_text("utf-8"))
    tokenizer = published / "tokenizer_config.json"
    if any(key in config for key in _OTHER_CONTENT) and config["model_type"] not in _WITH_LANGUAGE_MODEL:
        return "is not a text-only model"
    if "quantization_config" in config:
        return "is already quantized"
    if config["model_type"] not in CONFIG_MAPPING:
        return "transformers does not support"
    if (
        tokenizer.is_file()
        and not json.loads(tokenizer.read_text("utf-8")).get("chat_template")
        and not (published / "chat_template.jinja").is_file()
    ):
        return NO_TEMPLATE
    return None


def build_published(published: Path, folder: Path) -> Path:
    """Write a model folder from the publisher's files, with small random weights and a local vocabulary."""
    folder.mkdir()
    for path in published.iterdir():
        shutil.copyfile(path, folder / path.name)
    config = shrink((published / "config.json").read_bytes().decode("utf-8"))
    (folder / "config.json").write_bytes(config.encode("utf-8"))
    if refusal(published) in (None, NO_TEMPLATE):
        write_weights(folder, config)
        for path in published.glob("generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    else:
        from safetensors.torch import save_file

        save_file({}, folder / "model.safetensors")
    _write_tokenizer(folder)
    return folder


def shrink(config: str) -> str:
    """Return a config's text with small sizes and every other character unchanged."""
    groups = json.loads(config).get("num_key_value_heads") == json.loads(config).get("num_attention_heads")
    sizes = _SIZES | {"num_key_value_heads": _HEADS if groups else 1}
    for name, size in sizes.items():
        config = re.sub(rf'(?<="{name}": )\d+', str(size), config)
    for name, length in _LISTS.items():
        if found := re.search(rf'"{name}": (\[[^]]*])', config):
            config = config.replace(found[1], json.dumps(json.loads(found[1])[:length]))
    return config


def _write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, plus a tokenizer_config.json if the publisher's is not available."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        smollm2 = FAMILIES["smollm2"]
        path.write_text(smollm2.texts[path.name].replace('"@TEMPLATE@"', json.dumps(smollm2.template)), "utf-8")
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    vocabulary = Vocabulary.SMOLLM2
    if config.get("tokenizer_class", "").startswith(_SENTENCEPIECE_CLASSES):
        vocabulary = Vocabulary.MISTRAL_3 if config.get("pad_token") == "<pad>" else Vocabulary.MISTRAL_1
    tokens = {int(number): token["content"] for number, token in config.get("added_tokens_decoder", {}).items()}
    fits = {
        number: name
        for number, name in tokens.items()
        if number < _RESERVED[vocabulary] or number >= _FIRST_FREE_ID[vocabulary]
    }
    write_with_special_tokens(folder, vocabulary, fits)
