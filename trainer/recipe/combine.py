"""The `adapter.combine` keys of a recipe, which specify how several adapters are combined into one."""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from svc.version import NAME_PATTERN, NUMBER_PATTERN
from trainer.recipe.paths import HUB_ID_PATTERN, folder_beside_recipe
from trainer.recipe.section import Section

VERSION_PATTERN = rf"{NAME_PATTERN.removesuffix('$')}@{NUMBER_PATTERN}$"


class CombineMethod(StrEnum):
    """Method of PEFT's `add_weighted_adapter`. Methods whose name ends in `svd` combine the products B A of LoRA's
    factors, and factorize the result. All others, except `cat`, combine the factors A and B separately.
    """

    CAT = "cat"
    """The exact weighted sum of the updates. The result's rank is the sum of the adapters' ranks."""
    SVD = "svd"
    """The weighted sum of the updates, reduced to a smaller rank."""
    LINEAR = "linear"
    """The weighted sum of the factors, which only approximates the weighted sum of the updates."""
    TIES = "ties"
    """Each adapter's small values are dropped, and then the values whose sign differs from the majority sign of all
    adapters (Yadav et al. 2023)."""
    TIES_SVD = "ties_svd"
    DARE_LINEAR = "dare_linear"
    """Random values of each adapter are dropped, and its remaining values are scaled up (Yu et al. 2024)."""
    DARE_LINEAR_SVD = "dare_linear_svd"
    DARE_TIES = "dare_ties"
    """Random values of each adapter are dropped, and then the values whose sign differs from the majority sign of all
    adapters."""
    DARE_TIES_SVD = "dare_ties_svd"

    @property
    def drops(self) -> bool:
        """Whether the method drops values, and therefore needs a density."""
        return self.startswith(("ties", "dare"))

    @property
    def factorizes(self) -> bool:
        """Whether the method factorizes the combined update, so that a recipe may set the rank."""
        return self.endswith("svd")

    @property
    def needs_equal_ranks(self) -> bool:
        """Whether all adapters must have the same rank."""
        return self is not CombineMethod.CAT and not self.factorizes


class WeightedAdapter(Section):
    """One of the adapters to combine, and its weight in the combination."""

    adapter: Annotated[
        str, Field(pattern=rf"^[./~]|{HUB_ID_PATTERN}|{VERSION_PATTERN}"), AfterValidator(folder_beside_recipe)
    ]
    """a version (`NAME@N`), a folder (`./name`) or a Hugging Face id"""
    weight: float = 1.0
    """factor by which the adapter's update is multiplied; may be negative"""


class Combine(Section):
    """Adapters to combine."""

    method: CombineMethod
    """method of PEFT's `add_weighted_adapter`"""
    adapters: Annotated[tuple[WeightedAdapter, ...], Field(min_length=2)]
    """adapters to combine, all trained on the same base"""
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    """share of each adapter's values to keep; required by the methods whose names start with ties or dare"""

    @model_validator(mode="after")
    def _density_fits_method(self) -> "Combine":
        if self.method.drops and self.density is None:
            raise ValueError(f"`method: {self.method}` requires density, such as 0.5")
        if not self.method.drops and self.density is not None:
            raise ValueError(f"density is not used by `method: {self.method}`")
        return self

    @property
    def versions(self) -> tuple[str, ...]:
        """The adapters that are registered versions."""
        return tuple(part.adapter for part in self.adapters if "@" in part.adapter and "/" not in part.adapter)
