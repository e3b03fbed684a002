"""The `quantize` section of a recipe: settings for a version's quantized formats."""

from typing import Literal

from pydantic import Field

from trainer.recipe.section import Section


class Quantize(Section):
    """4-bit quantization with GPTQ and AWQ. `group_size` must divide the model's layer widths: 64 fits most models, and
    large models often use 128.
    """

    group_size: Literal[32, 64, 128] = 64
    """number of weights that share a quantization scale"""
    samples: int = Field(64, ge=8, le=1024)
    """number of training examples used to calibrate GPTQ and AWQ; they are truncated to `train.max_length`"""
    sequential: bool = True
    """GPTQ only: quantize the layers of a block one after another, each based on the outputs of the layers already
    quantized; slower"""
