"""Has the version forgotten more than the recipe allows, beyond doubt?"""

from svc.errors import TrainingError
from svc.evaluation.forgetting import Forgetting
from trainer.recipe.sections import Evaluate

_ROUNDING = 1e-9  # 0.745 - 0.695 is a little more than 0.05 to a computer
_FEWEST_LOST = 6
"""Fewer lost answers, and none gained, are chance more often than once in twenty times."""


def check_forgetting(found: Forgetting, limits: Evaluate) -> None:
    """Refuses a version that has lost more right answers to general questions than it may.

    Raises:
        TrainingError: with both figures and the interval of their difference, question by question.
    """
    most = limits.max_forgetting
    if most is None or found.lost < _FEWEST_LOST or found.difference.high >= -most - _ROUNDING:
        return
    raise TrainingError(
        f"training lost {-found.difference.value:.3f} of the right answers to {found.examples} general questions: "
        f"{found.before} before, {found.after} after, difference {found.difference}",
        expected=f"at most {most:.3f} (evaluate.max_forgetting)",
        todo="train less: a lower train.learning_rate or adapter.rank, fewer train.epochs; or mix in data.general",
    )
