"""What makes training fast on which machine: one choice each, from facts, with its reason.

Knows no model and no recipe. What a choice needs in the environment and does not find, it goes without.
"""

from dataclasses import dataclass
from enum import StrEnum


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
        group_by_length: batches of like length have little padding. Without padding there is nothing to group for, and
            a plain shuffle mixes the data better.
        liger_kernels: fused RMSNorm, rotary embedding and SwiGLU in Triton. There is no Triton on a CPU.
        fused_lora: trainer.fused_lora instead of PEFT's forward, measured on a CPU only.
        own_loss: trainer.answer_trainer's loss. On CUDA TRL scores labelled positions alone, in a fused kernel.
        gradient_checkpointing: layers are computed twice to keep little of them. Memory is what a GPU lacks, time is
            what a CPU lacks.
    """

    attention: Attention
    padding_free: bool
    group_by_length: bool
    liger_kernels: bool
    fused_lora: bool
    own_loss: bool
    gradient_checkpointing: bool


def choose_acceleration(facts: Facts) -> Acceleration:
    """The choices for a machine; see `Acceleration` for the reason of each."""
    attention = _attention(facts)
    padding_free = attention is not Attention.SDPA
    return Acceleration(
        attention=attention,
        padding_free=padding_free,
        group_by_length=not padding_free,
        liger_kernels=facts.cuda and "liger_kernel" in facts.packages,
        fused_lora=not facts.cuda,
        own_loss=not facts.cuda,
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
