"""What makes training fast on which machine: one choice each, from facts, with its reason.

Knows no model and no recipe. What a choice needs in the environment and does not find, it goes without. The loss and
the layers that are used on a CPU alone are chosen where they are (trainer.training.loss).
"""

from dataclasses import dataclass
from enum import StrEnum

_PACKAGES = ("flash_attn", "flash_attn_interface", "liger_kernel")


class Attention(StrEnum):
    """transformers' names, for `attn_implementation`."""

    FLASH_3 = "flash_attention_3"
    FLASH_2 = "flash_attention_2"
    SDPA = "sdpa"


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine and what is installed on it.

    Attributes:
        cuda: whether training runs on an NVIDIA GPU.
        capability: of that GPU, as (9, 0) for Hopper; None without one.
        packages: import names of those that are installed.
    """

    cuda: bool
    capability: tuple[int, int] | None = None
    packages: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Acceleration:
    """How to train on a machine.

    Attributes:
        attention: FlashAttention 3 is written for Hopper alone; 2 needs Ampere or later. Elsewhere PyTorch chooses.
        padding_free: rows of a batch go through as one, so that no padding is computed. Only FlashAttention keeps rows
            apart by their lengths; with SDPA they would need a mask as large as the square of the batch.
        liger_kernels: fused RMSNorm, rotary embedding and SwiGLU in Triton. There is no Triton on a CPU.
        gradient_checkpointing: layers are computed twice to keep little of them. Memory is what a GPU lacks, time is
            what a CPU lacks.
    """

    attention: Attention
    padding_free: bool
    liger_kernels: bool
    gradient_checkpointing: bool


def machine_facts() -> Facts:
    """The facts of this machine."""
    from importlib.util import find_spec

    import torch

    cuda = torch.cuda.is_available()
    installed = frozenset(name for name in _PACKAGES if find_spec(name) is not None)
    return Facts(cuda, torch.cuda.get_device_capability() if cuda else None, installed)


def choose_acceleration(facts: Facts, *, flash: bool = True) -> Acceleration:
    """The choices for a machine; see `Acceleration` for the reason of each.

    Args:
        flash: whether the model takes FlashAttention.
    """
    attention = _attention(facts) if flash else Attention.SDPA
    return Acceleration(
        attention=attention,
        padding_free=attention is not Attention.SDPA,
        liger_kernels=facts.cuda and "liger_kernel" in facts.packages,
        gradient_checkpointing=facts.cuda,
    )


def _attention(facts: Facts) -> Attention:
    if not facts.cuda or facts.capability is None:
        return Attention.SDPA
    # FlashAttention 3 was not made to run on what came after Hopper.
    if "flash_attn_interface" in facts.packages and facts.capability[0] == 9:
        return Attention.FLASH_3
    if "flash_attn" in facts.packages and facts.capability >= (8, 0):
        return Attention.FLASH_2
    return Attention.SDPA
