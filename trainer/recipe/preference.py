"""The `preference` section of a recipe: settings for preference tuning."""

from enum import StrEnum

from pydantic import Field

from svc.dataset.schema.objective import Objective
from trainer.recipe.section import Section


class DpoLoss(StrEnum):
    """DPO loss of a pair, as a function of the difference between the two answers' log ratios."""

    SIGMOID = "sigmoid"
    """Negative log-likelihood of the preference (Rafailov et al. 2023, eq. 7)."""
    IPO = "ipo"
    """Squared distance between the per-token difference and `1 / (2 * beta)`. This overfits less than `sigmoid`
    (Azar et al. 2023, eq. 17)."""
    ROBUST = "robust"
    """`sigmoid`, corrected for a known share of wrong preferences (Chowdhury et al. 2024)."""


class Preference(Section):
    """Preference tuning with `objective: dpo`, `orpo` or `kto`; see [training](training.md#preferences)."""

    beta: float = Field(0.1, gt=0)
    """dpo, kto: how close the model stays to its state before training (higher is closer); orpo: weight of the
    odds ratio loss, which is added to the better answer's negative log-likelihood"""
    loss: DpoLoss = DpoLoss.SIGMOID
    """dpo: sigmoid, ipo, or robust if a known share of the pairs is wrong"""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """dpo with `loss: robust`: assumed share of pairs whose preference is wrong"""
    desirable_weight: float = Field(1.0, gt=0)
    """kto: weight of desirable answers; choose both weights so that they balance the numbers of desirable and
    undesirable answers"""
    undesirable_weight: float = Field(1.0, gt=0)
    """kto: weight of undesirable answers"""


PREFERENCE_KEYS: dict[Objective, frozenset[str]] = {
    Objective.SFT: frozenset(),
    Objective.TEXT: frozenset(),
    Objective.DPO: frozenset({"beta", "loss", "label_smoothing"}),
    Objective.ORPO: frozenset({"beta"}),
    Objective.KTO: frozenset({"beta", "desirable_weight", "undesirable_weight"}),
}
"""Keys of the `preference` section that each objective uses."""
