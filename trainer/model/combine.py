"""Combines LoRA adapters of the same base into a single adapter, with PEFT's `add_weighted_adapter`.

The base's weights are not read. Instead, the layers contain zeros that occupy no memory. These zeros are not on the
meta device, because PEFT puts a new adapter on the device of its layer.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from trainer.model.layer_shapes import empty_model
from trainer.model.peft_config import loading_adapters
from trainer.recipe.combine import Combine

_CONFIG_FILE = "adapter_config.json"
_COMBINED = "combined"


@dataclass(frozen=True, slots=True)
class LoraPart:
    """An adapter to combine.

    Attributes:
        folder: folder with the adapter's weights.
        config: contents of adapter_config.json.
        layers: names of the layers that the adapter changes.
        weight: factor by which the adapter's update is multiplied.
    """

    folder: Path
    config: Mapping[str, Any]
    layers: Sequence[str]
    weight: float


def combine_adapters(
    base: Path, parts: Sequence[LoraPart], combine: Combine, out: Path, *, rank: int, seed: int
) -> None:
    """Write the combination of several adapters to a new folder, in float32, with a scale of 1.

    Args:
        base: folder with the base's config.json.
        rank: rank of the result, for methods that factorize.
        seed: random seed that determines which values DARE drops.

    Raises:
        ValueError: PEFT cannot combine the adapters.
    """
    model = _without_memory(empty_model(base))
    names = [f"part{place}" for place in range(len(parts))]
    with loading_adapters(), tempfile.TemporaryDirectory() as temporary:
        for name, part in zip(names, parts, strict=True):
            folder = _as_plain_lora(part, Path(temporary) / name)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, use_safetensors=True)
            else:
                model = PeftModel.from_pretrained(model, str(folder), name, use_safetensors=True)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model.base_model.add_weighted_adapter(
                names,
                [part.weight for part in parts],
                _COMBINED,
                combination_type=combine.method.value,
                density=combine.density,
                svd_rank=rank if combine.method.factorizes else None,
                svd_full_matrices=False,
            )
        state = get_peft_model_state_dict(model, adapter_name=_COMBINED, save_embedding_layers=False)
    out.mkdir(parents=True)
    tensors = {name: tensor.float().contiguous() for name, tensor in state.items()}
    save_file(tensors, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = model.peft_config[_COMBINED].to_dict() | {"base_model_name_or_path": str(base), "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (out / _CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", "utf-8")


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a model's weights on the meta device with zeros on the CPU, which are views of one zero in memory."""
    zero = torch.zeros(())
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(zero.expand(weight.shape), requires_grad=False))
    return model


def _as_plain_lora(part: LoraPart, folder: Path) -> Path:
    """Copy an adapter's weights to a new folder, with a plain LoRA config that states only rank, scale and layers.

    PEFT gives the combined adapter the config of the first adapter. With rsLoRA, the scale would then be wrong by the
    square root of the rank, and a restriction to some layers would drop the other adapters' layers. The config written
    here therefore sets an alpha that gives the same scale without rsLoRA, and lists the layers by name.
    """
    config, rank = part.config, part.config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    folder.mkdir()
    shutil.copyfile(part.folder / SAFETENSORS_WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME)
    plain = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted(part.layers),
        task_type="CAUSAL_LM",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )
    plain.save_pretrained(str(folder))
    return folder
