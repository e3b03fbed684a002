"""The training method and the `adapter` section of a recipe, which determine which weights are trained and how frozen
weights are stored."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trainer.recipe.combine import Combine
from trainer.recipe.paths import FolderOrHubId
from trainer.recipe.section import Section
from trainer.recipe.targets import TargetChoice, Targets


class AdapterType(StrEnum):
    """Kind of adapter, which determines how it changes a layer."""

    LORA = "lora"
    """A low-rank update added to frozen weights (Hu et al. 2021)."""
    DORA = "dora"
    """LoRA for the direction of the weights, plus one magnitude per output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA that distributes its ranks among the layers during training (Zhang et al. 2023)."""
    VERA = "vera"
    """Two trained vectors per layer, combined with random matrices that all layers share (Kopiczko et al.
    2023)."""


class Quantization(StrEnum):
    """How the frozen weights are stored while an adapter is trained."""

    NF4 = "nf4"
    """Quantization to four bits, with quantized scales (Dettmers et al. 2023)."""


class TokenLayer(StrEnum):
    """Layer whose weight matrix has one row per token of the vocabulary. Tied layers share their weights."""

    EMBEDDING = "embed_tokens"
    HEAD = "lm_head"


class Method(StrEnum):
    """Training method: the common name for an adapter type combined with a quantization of the base. `full`
    trains all weights.
    """

    FULL = "full"
    """Every weight is trained."""
    LORA = "lora"
    """Low-rank updates added to frozen weights (Hu et al. 2021)."""
    QLORA = "qlora"
    """LoRA on frozen weights stored in 4 bits (Dettmers et al. 2023), which take a quarter of the memory."""
    DORA = "dora"
    """LoRA for the direction of the weights, plus one magnitude per output (Liu et al. 2024)."""
    ADALORA = "adalora"
    """LoRA that distributes its ranks among the layers during training (Zhang et al. 2023)."""
    VERA = "vera"
    """Two trained vectors per layer, combined with random matrices that all layers share (Kopiczko et al.
    2023)."""


MAX_RANK = 1024
GAUSSIAN, OLORA, PISSA = "gaussian", "olora", "pissa"
"""Values of `adapter.init`, named as in PEFT. The values for approximate PiSSA also start with `pissa`."""


def pissa_iterations(init: str) -> int | None:
    """Return the number of iterations for approximate PiSSA, or None for exact PiSSA."""
    return int(number) if (number := init.partition("_niter_")[2]) else None


class Adapter(Section):
    """Adapter settings, which do not apply to `method: full`."""

    type: AdapterType | None = None
    """lora, dora, adalora or vera; default: the type implied by `method`"""
    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    """rank of the update; a higher rank can learn more but needs more memory; default: 16, or 256 for vera"""
    alpha: Annotated[int, Field(ge=1)] | None = None
    """scale of the update, which is multiplied by alpha / rank; default: twice the rank; not used by vera"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout probability for the adapter's inputs"""
    targets: TargetChoice = Targets.ALL_LINEAR
    """layers that get an adapter: all-linear, attention, attention-min (query and value only), or a list of layer
    names such as `[q_proj, v_proj]`"""
    rslora: bool = False
    """scale the adapter's output by alpha / sqrt(rank), so that large ranks learn as fast as small ones; lora and dora
    only"""
    init: Annotated[str, Field(pattern=r"^(gaussian|olora|pissa|pissa_niter_[1-9]\d{0,2})$")] | None = None
    """how the adapter's matrices are initialized: gaussian, olora, pissa, or pissa_niter_N for a faster approximate
    pissa with N iterations (1 to 999); lora only; default: one random and one zero matrix; see
    [training](training.md#first-matrices)"""
    modules_to_save: tuple[TokenLayer, ...] = ()
    """embeddings to train in full in addition to the adapter: embed_tokens, lm_head or both; lora and dora only; see
    [training](training.md#new-tokens)"""
    trained: FolderOrHubId = None
    """folder (`./name`) or Hugging Face id of an adapter saved by PEFT, to use as the version's adapter instead of
    training one; the keys of `train` then have no effect; see [adapters](adapters.md#adapters-trained-elsewhere)"""
    combine: Combine | None = None
    """adapters to combine into the version's adapter, instead of training one: `{method: , density: , adapters:
    [{adapter: , weight: }, ...]}`; see [adapters](adapters.md#combining-adapters)"""

    @property
    def given(self) -> str | None:
        """The key that specifies an existing adapter (`adapter.trained` or `adapter.combine`), or None if neither key
        is set.
        """
        return "adapter.trained" if self.trained else "adapter.combine" if self.combine else None

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapter is initialized from a part of the base's weights, which is then subtracted from them."""
        return self.init not in (None, GAUSSIAN)


UNUSED_KEYS = {
    AdapterType.VERA: frozenset({"alpha", "rslora", "init", "modules_to_save", "trained", "combine"}),
    AdapterType.ADALORA: frozenset({"rslora", "init", "modules_to_save", "trained", "combine"}),
    AdapterType.DORA: frozenset({"init"}),
}
"""Keys of the `adapter` section that an adapter type does not use."""
ADAPTER_TYPES = {Method.FULL: None, Method.QLORA: AdapterType.LORA} | {
    method: AdapterType(method) for method in Method if method not in (Method.FULL, Method.QLORA)
}
"""The adapter type that each method implies, or None for a method that trains no adapter."""
