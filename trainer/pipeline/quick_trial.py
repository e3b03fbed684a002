"""Quick trial of a recipe, which runs all stages on a tenth of the examples for one epoch, under a separate name.

The trial tests the setup, from the data to the engine, before the full run. The quality of its version is not
representative.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from svc.dataset.schema.example import ChatExample, normal_prompt
from trainer.data.fingerprint import fingerprint
from trainer.data.split import put_sample_first
from trainer.pipeline.examples import Examples, Preference, example_of, fingerprint_preferences
from trainer.recipe.evaluate import Undecided
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Train
from trainer.training.summary import TrainingSummary

_SHARE = 0.1
_SUFFIX = "-quick"
_MAX_NAME_LENGTH = 63
_MIN_EXAMPLES = 2
"""Minimum number of training examples in a trial. The same minimum applies to held-out examples."""


def quick_trial(recipe: Recipe, examples: Examples) -> tuple[Recipe, Examples]:
    """Return the recipe and examples of a quick trial. They include a random tenth of each kind of example,
    drawn with the recipe's seed.

    Files are often sorted by label or by length, so the first tenth would not be representative.
    """
    seed, task = recipe.data.seed, len(examples.train) - examples.general
    general = _tenth(examples.train[task:], seed)
    train = (*_tenth(examples.train[:task], seed, _MIN_EXAMPLES), *general)
    heldout, validation = _tenth(examples.heldout, seed, _MIN_EXAMPLES), _tenth(examples.validation, seed)
    preferences = _preferences_of(examples.preferences, train)
    if preferences:
        train = tuple(map(example_of, preferences))
    content = recipe.model_dump(exclude_unset=True)
    content["name"] = recipe.name[: _MAX_NAME_LENGTH - len(_SUFFIX)] + _SUFFIX
    content["train"] = content.get("train", {}) | {"epochs": 1.0, "steps": None}
    # The trial is trained too little to show the losses through quantization and forgetting.
    limits = {"max_gptq_loss": 1.0, "max_gptq_nll": 1.0, "max_forgetting": None, "undecided": Undecided.WARN}
    content["evaluate"] = content.get("evaluate", {}) | limits
    questions = examples.questions
    cut = replace(
        examples,
        train=train,
        heldout=heldout,
        train_fingerprint=fingerprint_preferences(preferences) if preferences else fingerprint(train),
        heldout_fingerprint=fingerprint(heldout),
        general=len(general),
        validation=validation,
        preferences=preferences,
        heldout_preferences=_preferences_of(examples.heldout_preferences, heldout),
        validation_preferences=_preferences_of(examples.validation_preferences, validation),
        questions=questions and questions.first(max(_MIN_EXAMPLES, math.ceil(_SHARE * len(questions.examples)))),
    )
    return Recipe.model_validate(content), cut


def _preferences_of(preferences: Sequence[Preference], examples: Sequence[ChatExample]) -> tuple[Preference, ...]:
    """Return the pairs or labeled answers that have the same prompts as the examples, in the examples' order."""
    places = {normal_prompt(example): place for place, example in reversed(list(enumerate(examples)))}
    found = [answer for answer in preferences if normal_prompt(example_of(answer)) in places]
    return tuple(sorted(found, key=lambda answer: places[normal_prompt(example_of(answer))]))


def _tenth(examples: Sequence[ChatExample], seed: int, fewest: int = 0) -> tuple[ChatExample, ...]:
    size = max(fewest, math.ceil(_SHARE * len(examples)))
    return tuple(put_sample_first(examples, size, seed)[:size])


def whole_run_seconds(train: Train, trial: TrainingSummary) -> float | None:
    """Estimate how many seconds training would take in the full run at the trial's speed. Return None if the speed
    is unknown.

    Args:
        train: the `train` section of the full run.
        trial: summary of the trial's training.
    """
    if trial.tokens_per_second == 0:  # the trial was interrupted after its last step
        return None
    steps = train.steps or trial.steps * train.epochs / _SHARE
    return trial.tokens / trial.tokens_per_second * steps / trial.steps
