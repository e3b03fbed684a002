"""Builds preference data and recipes that train with it."""

from typing import Any

from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from tests.trainer.conftest import make_example, make_recipe
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingData

COLOURS = ("red", "blue", "green")
PAIRS = [
    PreferencePair(
        make_example(f"number {'x' * number}", COLOURS[number % 3]),
        make_example(f"number {'x' * number}", COLOURS[(number + 1) % 3] * (1 + number % 2)),
    )
    for number in range(12)
]
LABELED = [
    LabeledAnswer(pair.chosen if place % 3 else pair.rejected, bool(place % 3)) for place, pair in enumerate(PAIRS)
]


def recipe_of(objective: Objective, method: Method = Method.LORA, **sections: Any) -> Recipe:
    """Return a recipe that trains for two epochs and writes a checkpoint at every step."""
    adapter = {} if method is Method.FULL else {"adapter": {"rank": 4}}
    train = {"batch_size": 3, "epochs": 2, "learning_rate": 1e-3} | sections.pop("train", {})
    content = {"checkpoints": {"every_steps": 1}, "objective": objective, "method": method, **adapter, "train": train}
    return make_recipe(**content | sections)


def preferences_for(objective: Objective) -> list[Any]:
    """Return the pairs or the labeled answers, whichever an objective uses."""
    return list(LABELED if objective is Objective.KTO else PAIRS)


def data_for(objective: Objective) -> TrainingData:
    """Return the data that an objective uses; five items are held out too."""
    judged = preferences_for(objective)
    return TrainingData((), preferences=judged, heldout_preferences=judged[:5])
