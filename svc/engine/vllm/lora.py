"""Chooses the launch options for an engine that applies LoRA adapters to its base (vLLM's runtime LoRA)."""

from collections.abc import Sequence
from dataclasses import dataclass

from svc.engine.vllm.choice import Choice, Origin, Value, as_argument, as_given
from svc.engine.vllm.plugin import LORA_VARIABLE

RUNTIME_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""Environment variable that enables the endpoints for loading and unloading adapters. They can be reached only through
the private socket."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""
LARGEST_RANK = _RANKS[-1]
_MIN_RANK = 16
_MAX_BATCHED = 8
USUAL_TARGETS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    }
)
"""Attention and MLP layers, under the names that most architectures use and those that vLLM gives to fused
layers. If adapters may change all layers, including the output layer, vLLM 0.32 crashes on a CPU when
prompt log-probabilities are requested."""


@dataclass(frozen=True, slots=True)
class LoraSlots:
    """An engine's capacity for adapters: how many it can load, and of what size.

    Attributes:
        max_loaded: maximum number of adapters loaded at the same time.
        max_batched: maximum number of different adapters in one batch.
        max_rank: maximum rank of an adapter, which is one of the values that vLLM accepts.
        targets: sorted names of the layers that adapters may change, each without its path.
        bytes: maximum memory of one adapter, in bytes.
    """

    max_loaded: int
    max_batched: int
    max_rank: int
    targets: tuple[str, ...]
    bytes: int = 0

    @property
    def memory(self) -> int:
        """Total memory needed for adapters, in bytes."""
        return self.bytes * (self.max_loaded + self.max_batched)

    def parts(self) -> list[Value]:
        """Return the capacity as a list of values. Equal capacities give equal lists."""
        return [self.max_loaded, self.max_batched, self.max_rank, *self.targets]


def choose_slots(*, max_loaded: int, max_rank: int | None, rank: int, targets: frozenset[str], size: int) -> LoraSlots:
    """Choose an engine's capacity for adapters that are similar to a given adapter.

    Args:
        max_loaded, max_rank: the values from the settings.
        rank: the given adapter's rank, at most `max_rank`.
        targets: names of the layers that the adapter changes, each without its path.
        size: total size of the adapter's files, in bytes.
    """
    wanted = max(rank, _MIN_RANK) if max_rank is None else max_rank
    largest = next((accepted for accepted in _RANKS if accepted >= wanted), LARGEST_RANK)
    return LoraSlots(
        max_loaded=max_loaded,
        max_batched=min(_MAX_BATCHED, max_loaded),
        max_rank=largest,
        targets=tuple(sorted(targets | USUAL_TARGETS)),
        bytes=size * largest // max(rank, 1),
    )


def lora_choices(slots: LoraSlots, args: Sequence[str]) -> tuple[Choice, ...]:
    """Return the launch options that give an engine the requested capacity for adapters.

    Args:
        args: `engine.args`, which take precedence.
    """
    values: dict[str, Value] = {
        "max_loras": slots.max_batched,
        "max_cpu_loras": slots.max_loaded,
        "max_lora_rank": slots.max_rank,
    }
    variables = ((RUNTIME_VARIABLE, "True"), (LORA_VARIABLE, "1"))
    enabled = Choice(
        "enable_lora", True, Origin.DEFAULT, "to serve adapters of the base", ("--enable-lora",), variables
    )
    targets = ("--lora-target-modules", *slots.targets)
    layers = Choice(
        "lora_target_modules", " ".join(slots.targets), Origin.MODEL, "the output layer is never adapted", targets
    )
    limits = (
        as_given(name, args) or as_argument(name, value, Origin.SETTING, "adapters") for name, value in values.items()
    )
    return (enabled, *limits, layers)
