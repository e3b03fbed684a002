"""Implements the linear layers of GPTQ and AWQ models on CPUs without AVX-512, for which vLLM has no 4-bit kernel.

The matrix product is computed by PyTorch's operator for 4-bit weights, which has kernels for AVX2 and
AVX-512. The weights remain 4-bit but are stored in the operator's layout. Each group's scale takes 4
bytes instead of 2. This module is imported only inside vLLM.
"""

import torch
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

_GROUP_SIZES = (256, 128, 64, 32)
"""Group sizes that PyTorch's operator for 4-bit weights supports as of PyTorch 2.13."""
_WIDTH = 32
"""A layer's input and output sizes must be multiples of this value. vLLM's own kernel has the same requirement."""


class Int4LinearKernel(MPLinearKernel):
    """Computes y = W x + b with 4-bit weights W.

    Each group of inputs has its own bfloat16 scale. The zero point is always 8 in GPTQ; in AWQ, each group has its own.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # capabilities are of GPUs

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Return whether the operator supports a layer, along with the reason if it does not."""
        inputs, outputs = c.partition_weight_shape
        if c.weight_type != (scalar_types.uint4 if c.zero_points else scalar_types.uint4b8):
            return False, f"weights are {c.weight_type}; only 4-bit weights are supported"
        if c.act_type != torch.bfloat16:
            return False, f"activations are in {c.act_type}; the operator is fast only in bfloat16"
        if inputs % _WIDTH or outputs % _WIDTH:
            return False, f"the layer is {inputs} x {outputs}; only multiples of {_WIDTH} are supported"
        if c.group_size != -1 and c.group_size % _GROUP_SIZES[-1]:
            return False, f"the group size is {c.group_size}; only multiples of {_GROUP_SIZES[-1]} are supported"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Convert weights, scales and zero points to the operator's layout. This runs after each load, including
        in-place reloads.
        """
        inputs = self.config.partition_weight_shape[0]
        self._group_size = operator_group_size(self.config.group_size, inputs)
        groups = inputs // self._group_size
        self._transform_param(layer, self.w_q_name, lambda packed: pack_weights(packed.data))
        zeros = unpack_zeros(getattr(layer, self.w_zp_name or "")) if self.config.zero_points else None
        self._transform_param(layer, self.w_s_name, lambda scales: spread_scales(scales.data, groups, zeros))
        if self.w_zp_name is not None:
            setattr(layer, self.w_zp_name, None)  # they are in the scales' parameter

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the outputs of the layer.

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
    """Return the largest group size that the operator supports and that divides the model's group size.

    Args:
        group_size: number of inputs that share a scale. It must be a multiple of 32, or -1 if all inputs
            share one.
        inputs: number of inputs of the layer, which must be a multiple of 32.
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


def unpack_zeros(packed: torch.Tensor) -> torch.Tensor:
    """Unpack the zero points of an AWQ layer from the packed layout in which vLLM passes them.

    Args:
        packed: [out / 8, groups], int32; each value contains the zero points of eight outputs.

    Returns:
        [groups, out], int32.
    """
    return unpack_quantized_values_into_int32(packed.data, scalar_types.uint4, 0).T


def spread_scales(scales: torch.Tensor, groups: int, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """Convert scales to the operator's layout, in which each scale is paired with an offset.

    The operator computes (weight - 8) * scale + offset.

    Args:
        scales: [groups in the model, out].
        groups: number of groups in the operator's layout, a multiple of the number in the model.
        zeros: zero points, of the same shape as `scales`; None if all are 8.

    Returns:
        [groups, out, 2].
    """
    offsets = torch.zeros_like(scales) if zeros is None else ((8 - zeros) * scales.float()).to(scales.dtype)
    return torch.stack([scales, offsets], dim=-1).repeat_interleave(groups // len(scales), dim=0).contiguous()
