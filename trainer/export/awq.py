"""The AWQ-specific parts of quantization with gptqmodel: options, calibration texts and clipping.

Before rounding, AWQ scales up the most important input columns of a layer, and scales down the preceding norm (for
`down_proj`, the rows of `up_proj`) by the same factors. It then clips each group's weights where that lowers the error
of the outputs, and rounds to nearest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.engine.device import NumberType
from svc.errors import TrainingError
from trainer.model.config import load_config

if TYPE_CHECKING:
    import torch
    from gptqmodel import QuantizeConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures for which trainer.evaluation.parity.awq can undo the AWQ scales and compare the weights with the
merged model. In gptqmodel's definitions of other architectures, the scales are applied to other layers."""
_BLOCK = 512
"""Number of tokens in a calibration text. If texts have different lengths, gptqmodel calibrates AWQ with only the last
batch."""
_CLIP_STEPS, _CLIP_SHARE = 10, 0.05
"""Number and size of the steps in the clipping search, as in gptqmodel. The search tries 1, 0.95 and so on down to 0.55
times the largest weight."""


def check_awq(model: Path, number_type: NumberType) -> None:
    """Check that gptqmodel can quantize a model with AWQ on this machine.

    Args:
        number_type: data type of training on this machine.

    Raises:
        TrainingError: the model's architecture is not one of `ARCHITECTURES`, or bfloat16 is slow on this machine.
    """
    family = load_config(model).model_type
    if family not in ARCHITECTURES:
        raise TrainingError(
            f"AWQ is not available for {family!r}, the model_type of {model}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            todo="replace awq with gptq in `formats`",
        )
    if number_type is not NumberType.BFLOAT16:
        raise TrainingError(
            f"this machine computes in {number_type}, but gptqmodel supports AWQ in bfloat16 only",
            expected="a CPU or GPU with fast bfloat16",
            todo="replace awq with gptq in `formats`, or train on another machine",
        )


def equal_blocks(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the tokens of all rows as blocks of equal length. A shorter last block is dropped."""
    tokens = tuple(chain.from_iterable(rows))
    size = min(_BLOCK, len(tokens))
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def awq_options(group_size: int, offload: str) -> "QuantizeConfig":
    """Return gptqmodel's options: 4 bits with a zero point for each group, as in the AWQ paper."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.config import FORMAT, METHOD

    return QuantizeConfig(
        bits=4,
        group_size=group_size,
        method=METHOD.AWQ,
        format=FORMAT.GEMM,
        sym=False,
        offload_to_disk=True,
        offload_to_disk_path=offload,
    )


def check_calibration(log: Sequence[Mapping[str, Any]]) -> None:
    """Verify, using gptqmodel's records, that each layer was calibrated with all tokens.

    Raises:
        TrainingError: a layer was calibrated with only some of the tokens.
    """
    for entry in log:
        if entry["activation_retained_tokens"] < entry["activation_raw_tokens"]:
            raise TrainingError(
                f"gptqmodel calibrated {entry['layer']}.{entry['module']} with {entry['activation_retained_tokens']} "
                f"of {entry['activation_raw_tokens']} tokens",
                expected="all tokens",
            )


@contextmanager
def exact_clipping() -> Iterator[None]:
    """Make gptqmodel use our clipping search within the `with` block.

    This replaces gptqmodel's method, which multiplies at most 512 tokens by every weight for each step. For one matrix
    of 1,536 x 576 on two busy cores, gptqmodel's method took 28 s, and ours 1 to 2 s with 6,144 tokens.
    """
    from gptqmodel.looper.awq_processor import AWQProcessor

    library = AWQProcessor._compute_best_clip

    def search(processor: Any, weight: "torch.Tensor", inputs: "torch.Tensor") -> "torch.Tensor":
        limits = best_clip(weight, inputs, processor.qcfg.group_size, processor._pseudo_quantize_tensor_into)
        return limits.to(weight.dtype)

    AWQProcessor._compute_best_clip = search
    try:
        yield
    finally:
        AWQProcessor._compute_best_clip = library


def best_clip(
    weight: "torch.Tensor",
    inputs: "torch.Tensor",
    group_size: int,
    round_into: "Callable[[torch.Tensor, torch.Tensor], None]",
) -> "torch.Tensor":
    """Return, for each group of weights, the clipping limit that minimizes the change that rounding causes in the
    group's contribution to the outputs.

    If rounding changes a group's weights by d, the output changes by x·d for a token with the inputs x. The mean square
    of this change over all tokens is d·G·d, where G is the mean outer product of x with itself. The number of values in
    G is the square of the group size, whatever the number of tokens.

    Args:
        weight: [outputs, inputs].
        inputs: [..., inputs], the layer's inputs for the calibration tokens.
        round_into: function that rounds its first argument and writes the result into its second argument.

    Returns:
        Float32 limits of shape [outputs, groups, 1].
    """
    import torch

    outputs = len(weight)
    grouped = inputs.reshape(-1, weight.shape[1] // group_size, group_size).to(weight.device, torch.float32)
    squares = torch.einsum("tgi,tgj->gij", grouped, grouped) / len(grouped)
    weights = weight.float().view(outputs, -1, group_size)
    largest = weights.abs().amax(dim=-1, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    rounded = torch.empty_like(weights)
    for step in range(_CLIP_STEPS):
        limit = largest * (1 - step * _CLIP_SHARE)
        round_into(weights.clamp(-limit, limit), rounded)
        change = (rounded - weights).transpose(0, 1)
        error = ((change @ squares) * change).sum(dim=-1).T.unsqueeze(-1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, limit, best)
    return best
