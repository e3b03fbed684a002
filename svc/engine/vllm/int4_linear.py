"""Linear layers of GPTQ models on CPUs without AVX-512, for which vLLM has no 4-bit kernel.

The product is computed by PyTorch's operator for 4-bit weights, which has kernels for AVX2 and AVX-512.
Weights stay in 4 bits, in the operator's layout; scales take 4 bytes per group instead of 2. This module
is imported only inside vLLM.
"""

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

_GROUP_SIZES = (256, 128, 64, 32)
"""Group sizes that the operator supports in PyTorch 2.13."""
_WIDTH = 32
"""Number that must divide a layer's inputs and outputs, for the operator as for vLLM's own kernel."""


class Int4LinearKernel(MPLinearKernel):
    """Computes y = W x + b, with 4-bit W around a zero point of 8 and one bfloat16 scale per group of inputs."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # capabilities are of GPUs

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether the operator supports a given layer, and if not, the reason."""
        inputs, outputs = c.partition_weight_shape
        if c.weight_type != scalar_types.uint4b8 or c.zero_points:
            return False, f"weights are {c.weight_type}; only symmetric 4-bit weights are supported"
        if c.act_type != torch.bfloat16:
            return False, f"activations are in {c.act_type}; the operator is fast only in bfloat16"
        if inputs % _WIDTH or outputs % _WIDTH:
            return False, f"the layer is {inputs} x {outputs}; only multiples of {_WIDTH} are supported"
        if c.group_size != -1 and c.group_size % _GROUP_SIZES[-1]:
            return False, f"the group size is {c.group_size}; only multiples of {_GROUP_SIZES[-1]} are supported"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Convert weights and scales to the operator's layout, after each load, including an in-place reload."""
        inputs = self.config.partition_weight_shape[0]
        self._group_size = operator_group_size(self.config.group_size, inputs)
        groups = inputs // self._group_size
        self._transform_param(layer, self.w_q_name, lambda packed: pack_weights(packed.data))
        self._transform_param(layer, self.w_s_name, lambda scales: spread_scales(scales.data, groups))
        if self.w_zp_name is not None:
            setattr(layer, self.w_zp_name, None)  # 8 for every group

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return the outputs of the layer.

        Args:
            x: [..., in], bfloat16.
            bias: [out], bfloat16.

        Returns:
            [..., out], bfloat16.
        """
        weights, scales, _ = self._get_weight_params(layer)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weights, self._group_size, scales)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], -1)


def operator_group_size(group_size: int, inputs: int) -> int:
    """Return the operator's largest group size that divides the model's group size.

    Args:
        group_size: number of inputs that share a scale, a multiple of 32, or -1 for all inputs.
        inputs: number of the layer's inputs, a multiple of 32.
    """
    whole = inputs if group_size == -1 else group_size
    return next(size for size in _GROUP_SIZES if whole % size == 0)


def pack_weights(packed: torch.Tensor) -> torch.Tensor:
    """Convert weights from the GPTQ layout to the operator's layout.

    Args:
        packed: [in / 8, out], int32; each value contains the weights of eight inputs.

    Returns:
        [out, in / 2], uint8.
    """
    values = unpack_quantized_values_into_int32(packed, scalar_types.uint4b8, 0)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.T.contiguous(), 1)


def spread_scales(scales: torch.Tensor, groups: int) -> torch.Tensor:
    """Return scales in the operator's layout, each with an offset of 0.

    Args:
        scales: [groups of the model, out].
        groups: the operator's number of groups, a multiple of the model's.

    Returns:
        [groups, out, 2].
    """
    repeated = scales.repeat_interleave(groups // len(scales), dim=0)
    return torch.stack([repeated, torch.zeros_like(repeated)], dim=-1).contiguous()
