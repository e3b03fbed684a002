"""Provides the weights on which QLoRA trains an adapter: the base's weights, with linear layers rounded to NF4 and
dequantized. Imports torch.

bitsandbytes dequantizes a layer's weights for each matrix multiplication, so an adapter is trained on these weights
and not on the base's own.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from trainer.model.layer_shapes import linear_layers
from trainer.model.stored_weights import StoredWeights


class DequantizedWeights(StoredWeights):
    """Weights from a model folder. Those of linear layers are rounded to NF4 and dequantized when they are read.

    Args:
        folder: folder with a model in safetensors.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._rounded = {f"{layer}.weight" for layer in linear_layers(self.model)}

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._rounded:
            return super().read(name, dtype)
        return round_to_nf4(super().read(name, torch.float32)).to(dtype)


def round_layers_to_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """Round the linear layers of a loaded model to NF4 in place, one by one, and return the model."""
    for name in linear_layers(model):
        weight = model.get_submodule(name).weight
        weight.data = round_to_nf4(weight.data)
    return model


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantize a linear layer's weight to NF4 with quantized scales, and dequantize it to its original data
    type.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Params4bit

    packed = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(weight.device)
    dequantized: torch.Tensor = dequantize_4bit(packed.data, packed.quant_state)
    return dequantized.to(weight.dtype)
