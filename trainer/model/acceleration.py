"""Chooses the options that make training fast on a given machine, based on the machine's properties.

Options whose packages are not installed, or do not support the model, stay off. trainer.training.loss
chooses the loss and, on a CPU, the implementation of layers. trainer.training.mechanisms checks that the options are
active.
"""

from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path

from trainer.model.config import load_config


class Attention(StrEnum):
    """Attention implementation, as named in transformers' `attn_implementation`."""

    FLASH_3 = "flash_attention_3"
    FLASH_2 = "flash_attention_2"
    SDPA = "sdpa"


@dataclass(frozen=True, slots=True)
class Facts:
    """Properties of the machine and its installed packages.

    Attributes:
        capability: compute capability of the NVIDIA GPU, for example (9, 0) for Hopper, or None if there is
            no such GPU.
        flash_attention_2, flash_attention_3, liger_kernels: whether the package is installed in a release
            that transformers supports. Checking only the import name would mistake FlashAttention 4 for 2.
    """

    capability: tuple[int, int] | None = None
    flash_attention_2: bool = False
    flash_attention_3: bool = False
    liger_kernels: bool = False


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Acceleration options for training on a machine.

    Attributes:
        attention: the attention implementation. FlashAttention 3 supports only Hopper, and FlashAttention 2
            needs Ampere or later; otherwise PyTorch's SDPA is used.
        padding_free: whether the rows of a batch are concatenated, so that nothing is padded. Only
            FlashAttention separates rows by their lengths; SDPA would need a mask whose size is the square
            of the batch size in tokens.
        liger_kernels: whether to use fused RMSNorm, rotary embedding and SwiGLU kernels in Triton, which
            does not run on a CPU.
        gradient_checkpointing: whether layers are computed twice to save memory. Memory is scarce on a GPU;
            on a CPU, time is scarcer.
    """

    attention: Attention
    padding_free: bool
    liger_kernels: bool
    gradient_checkpointing: bool


def machine_facts() -> Facts:
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_liger_kernel_available

    return Facts(
        torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        flash_attention_2=is_flash_attn_2_available(),
        flash_attention_3=is_flash_attn_3_available(),
        liger_kernels=is_liger_kernel_available(),
    )


def takes_liger_kernels(base: Path) -> bool:
    """Return whether the installed Liger has kernels for the model. For other models, applying Liger silently has no
    effect.

    Args:
        base: folder of the base model.
    """
    import torch
    from transformers.utils import is_liger_kernel_available

    if not (torch.cuda.is_available() and is_liger_kernel_available()):
        return False
    liger = import_module("liger_kernel.transformers.monkey_patch")
    return load_config(base).model_type in liger.MODEL_TYPE_TO_APPLY_LIGER_FN


def choose_acceleration(facts: Facts, *, flash: bool = True, liger: bool = True) -> Acceleration:
    """Choose the acceleration options for a machine; see `Acceleration` for the reasons.

    Args:
        flash: whether the model supports FlashAttention.
        liger: whether Liger supports the model.
    """
    attention, cuda = _attention(facts) if flash else Attention.SDPA, facts.capability is not None
    return Acceleration(
        attention=attention,
        padding_free=attention is not Attention.SDPA,
        liger_kernels=cuda and facts.liger_kernels and liger,
        gradient_checkpointing=cuda,
    )


def _attention(facts: Facts) -> Attention:
    if facts.capability is None:
        return Attention.SDPA
    # FlashAttention 3 does not support the architectures after Hopper.
    if facts.flash_attention_3 and facts.capability[0] == 9:
        return Attention.FLASH_3
    if facts.flash_attention_2 and facts.capability >= (8, 0):
        return Attention.FLASH_2
    return Attention.SDPA
