"""Training objectives, which determine the kind of training data."""

from enum import StrEnum


class Objective(StrEnum):
    """What a model learns from: reference answers, a preference among judged answers, or documents."""

    SFT = "sft"
    """The likelihood of the reference answers."""
    DPO = "dpo"
    """Pairs of answers, compared with the model before training (Rafailov et al. 2023)."""
    ORPO = "orpo"
    """Pairs of answers, and the likelihood of the better ones; no reference model (Hong et al. 2024)."""
    KTO = "kto"
    """Single answers that are desirable or not, compared with the model before training (Ethayarajh et al.
    2024)."""
    TEXT = "text"
    """The likelihood of all tokens of documents, without turns (continued pretraining)."""

    @property
    def is_preference(self) -> bool:
        """Whether the model learns from a preference among judged answers."""
        return self in (Objective.DPO, Objective.ORPO, Objective.KTO)

    @property
    def needs_reference(self) -> bool:
        """Whether the untrained model also scores the answers."""
        return self in (Objective.DPO, Objective.KTO)
