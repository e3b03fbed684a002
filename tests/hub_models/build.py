"""Builds base models as they appear on the hub: a publisher's files around small random weights.

transformers' `save_pretrained` writes different files: it spells a config in its own way, adds defaults,
and omits everything that a repository contains besides the model.
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.hub_models.family import FAMILIES
from tests.hub_models.tokenizer import PUBLISHED, token_ids, write_tokenizer

if TYPE_CHECKING:
    import torch

_TEMPLATE_PLACE = '"@TEMPLATE@"'
_LARGEST_SHARD = "200KB"
_LARGE_FILES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_FOREIGN_CODE = 'raise SystemExit("code from a model folder was run")\n'
_MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attention_norm",
}


def build_hub_model(folder: Path, family: str, *, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """Write a base model as its publisher would, and return its folder.

    Args:
        folder: folder to write to, created if necessary.
        family: a key of FAMILIES.
        tokenizer: folder with the family's real tokenizer.json. If None, a local tokenizer is used, and the
            vocabulary size and special token ids are adapted to it.
    """
    fixture = FAMILIES[family]
    ids = token_ids(fixture) if tokenizer is None else PUBLISHED
    template = json.dumps(fixture.template)
    texts = {name: ids.rewrite(text).replace(_TEMPLATE_PLACE, template) for name, text in fixture.texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_tokenizer(folder, fixture)
    else:
        shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    write_weights(folder, texts["config.json"], seed)
    _write_other_files(folder, fixture.licence)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("utf-8"))
    if _TEMPLATE_PLACE not in fixture.texts["tokenizer_config.json"]:
        (folder / "chat_template.jinja").write_text(fixture.template, "utf-8")
    return folder


def write_weights(folder: Path, config: str, seed: int = 0) -> None:
    """Write random weights for a config in several shards, with the hub's tensor names and the config's type."""
    import torch
    from safetensors.torch import save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    values = json.loads(config)
    # Larger than the published 0.02, so that answers differ from uniform noise.
    loaded = CONFIG_MAPPING[values["model_type"]].from_dict(values | {"initializer_range": 0.1})
    text = loaded.get_text_config()
    text.initializer_range = 0.1
    loaded.tie_word_embeddings = text.tie_word_embeddings  # Mistral 3's are not tied
    torch.manual_seed(seed)
    loader = AutoModelForImageTextToText if "vision_config" in values else AutoModelForCausalLM
    model = loader.from_config(loaded).to(getattr(torch, values.get("torch_dtype") or "bfloat16"))
    # A published model never gives an id without a token. vLLM 0.32 stops at one: with a SentencePiece vocabulary it
    # cannot decode it.
    if (tokens := _count_tokens(folder)) is not None:
        with torch.no_grad():
            model.get_output_embeddings().weight[tokens:] = 0
    model.save_pretrained(folder, max_shard_size=_LARGEST_SHARD)
    if values["model_type"] == "mistral":
        save_file(_in_mistral_names(model.state_dict()), folder / "consolidated.safetensors", {"format": "pt"})
        parameters = {"dim": values["hidden_size"], "n_layers": values["num_hidden_layers"], "head_dim": 32}
        (folder / "params.json").write_text(json.dumps(parameters, indent=4), "utf-8")
    (folder / "config.json").write_bytes(config.encode("utf-8"))
    (folder / "generation_config.json").unlink(missing_ok=True)


def _count_tokens(folder: Path) -> int | None:
    """Return the number of ids in a folder's tokenizer.json, or None if there is no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text("utf-8"))
    ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    return int(max(ids)) + 1


def _in_mistral_names(weights: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """Return the weights under Mistral's own names, with rows in unchanged order. Readers must ignore them."""
    pattern = re.compile("|".join(map(re.escape, _MISTRAL_NAMES)))
    return {pattern.sub(lambda name: _MISTRAL_NAMES[name[0]], name): weight for name, weight in weights.items()}


def _write_other_files(folder: Path, licence: str) -> None:
    """Write the other files that repositories contain besides a model. Only the model card may be read."""
    (folder / ".gitattributes").write_text(_LARGE_FILES, "utf-8")
    (folder / "README.md").write_text(f"---\nlicense: {licence}\nlanguage:\n- en\n---\n\n# A model\n", "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if licence.startswith("llama"):
        original = folder / "original"
        original.mkdir(exist_ok=True)
        (original / "consolidated.00.pth").write_bytes(b"a pickle that nobody may load")
        (original / "params.json").write_text(json.dumps({"dim": config["hidden_size"], "n_layers": 2}), "utf-8")
    for reference in (config.get("auto_map") or {}).values():
        (folder / f"{reference.partition('.')[0]}.py").write_text(_FOREIGN_CODE, "utf-8")
