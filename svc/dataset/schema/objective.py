"""Training objectives, which determine the kind of training data."""

from enum import StrEnum


class Objective(StrEnum):
    """A training objective, which determines whether the model learns from answers, preferences or documents."""

    SFT = "sft"
    """Maximize the likelihood of the reference answers."""
    DPO = "dpo"
    """Raise the likelihood of the better answer of each pair relative to the worse one, compared with the model before
    training (Rafailov et al. 2023)."""
    ORPO = "orpo"
    """Prefer the better answer of each pair and maximize its likelihood, without a reference model (Hong et al.
    2024)."""
    KTO = "kto"
    """Make desirable answers more likely than in the model before training, and undesirable ones less likely. Needs no
    pairs (Ethayarajh et al. 2024)."""
    TEXT = "text"
    """Maximize the likelihood of every token of plain documents, which have no turns (continued pretraining)."""

    @property
    def is_preference(self) -> bool:
        """Whether the model learns from preferences between answers."""
        return self in (Objective.DPO, Objective.ORPO, Objective.KTO)

    @property
    def needs_reference(self) -> bool:
        """Whether training needs the log-probabilities that the model assigns to the answers before training."""
        return self in (Objective.DPO, Objective.KTO)
