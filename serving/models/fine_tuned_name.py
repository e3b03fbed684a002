"""Client-facing names of fine-tuned models, in OpenAI's form: `ft:BASE:ORGANIZATION:SUFFIX:ID`.

A checkpoint's name is its model's name followed by `:ckpt-step-N`. The suffix may be empty.
"""

import re
from dataclasses import dataclass, replace

PREFIX = "ft:"
_PARTS = 5
_STEP = re.compile(r"ckpt-step-([1-9][0-9]{0,8})")
_ID_LENGTH = 12


@dataclass(frozen=True, slots=True)
class FineTunedName:
    """A name of a fine-tuned model, or of one of its checkpoints.

    Attributes:
        base: the base's name, as given by the client.
        suffix: the suffix that the client chose, or empty.
        id: short id of the job.
        step: step of the checkpoint, or None for the fully trained model.
    """

    base: str
    organization: str
    suffix: str
    id: str
    step: int | None = None

    def __str__(self) -> str:
        checkpoint = "" if self.step is None else f":ckpt-step-{self.step}"
        return f"{PREFIX}{self.base}:{self.organization}:{self.suffix}:{self.id}{checkpoint}"

    def at_step(self, step: int) -> "FineTunedName":
        """Return the name of the model's checkpoint at a step."""
        return replace(self, step=step)


def make_fine_tuned_name(*, model: str, organization: str, suffix: str, job: str) -> FineTunedName:
    """Return the name of the model that a job produces.

    Args:
        model: the model from which training starts, as named by the client. If that model is itself fine-tuned, the
            new name contains its base.
        job: id of the job.
    """
    trained = parse_fine_tuned_name(model)
    base = trained.base if trained else model.removeprefix(PREFIX).replace(":", "-")
    return FineTunedName(base, organization, suffix, job.rpartition("-")[2][:_ID_LENGTH])


def parse_fine_tuned_name(text: str) -> FineTunedName | None:
    """Parse a fine-tuned model's name. Return None if the text is not such a name."""
    kind, *parts = text.split(":")
    if f"{kind}:" != PREFIX or len(parts) not in (_PARTS - 1, _PARTS):
        return None
    base, organization, suffix, id = parts[: _PARTS - 1]
    if not (base and organization and id):
        return None
    if len(parts) < _PARTS:
        return FineTunedName(base, organization, suffix, id)
    step = _STEP.fullmatch(parts[-1])
    return FineTunedName(base, organization, suffix, id, int(step[1])) if step else None
