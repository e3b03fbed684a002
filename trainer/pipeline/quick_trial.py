"""A quick trial of a recipe: a tenth of the examples, one epoch, all stages, under a name of its own.

It tries the set-up, from the data to the engine, before hours are spent on it. Its version says nothing of quality.
"""

import math
from dataclasses import replace

from svc.dataset.fingerprint import fingerprint
from trainer.pipeline.examples import Examples
from trainer.recipe.sections import Recipe, Train, Undecided
from trainer.training.summary import TrainingSummary

_SHARE = 0.1
_SUFFIX = "-quick"
_LONGEST_NAME = 63
_FEWEST = 2
"""Examples below which nothing is learnt or judged."""


def quick_trial(recipe: Recipe, examples: Examples) -> tuple[Recipe, Examples]:
    """The recipe and the examples of the trial: the first tenth of those to train on and of those to judge by."""
    train = examples.train[: max(_FEWEST, math.ceil(_SHARE * len(examples.train)))]
    heldout = examples.heldout[: max(_FEWEST, math.ceil(_SHARE * len(examples.heldout)))]
    content = recipe.model_dump(exclude_unset=True)
    content["name"] = recipe.name[: _LONGEST_NAME - len(_SUFFIX)] + _SUFFIX
    content["train"] = content.get("train", {}) | {"epochs": 1.0, "steps": None}
    # It is trained too little to say what quantizing costs, and what is forgotten.
    limits = {"max_gptq_loss": 1.0, "max_gptq_nll": 1.0, "max_forgetting": None, "undecided": Undecided.WARN}
    content["evaluate"] = content.get("evaluate", {}) | limits
    questions = examples.questions
    cut = replace(
        examples,
        train=train,
        heldout=heldout,
        train_fingerprint=fingerprint(train),
        heldout_fingerprint=fingerprint(heldout),
        general=max(0, len(train) + examples.general - len(examples.train)),
        questions=questions and questions.first(max(_FEWEST, math.ceil(_SHARE * len(questions.examples)))),
    )
    return Recipe.model_validate(content), cut


def whole_run_seconds(train: Train, trial: TrainingSummary) -> float | None:
    """How long the optimizer will run in the whole run, from its speed in the trial; None where no step told that.

    Args:
        train: the whole run's.
        trial: what the trial's training said.
    """
    if trial.tokens_per_second == 0:  # it was cut off after its last step
        return None
    whole = train.steps or trial.steps * train.epochs / _SHARE
    return trial.tokens / trial.tokens_per_second * whole / trial.steps
