"""What stages leave for later ones, as it is written into the run's folder; training and exports have own types."""

from pydantic import BaseModel, ConfigDict

from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.results import ExampleResult
from svc.version import VersionId
from trainer.qualification import Qualified


class Evaluated(BaseModel):
    """Result of the stage `evaluate`.

    Attributes:
        base_results: the answers behind the report.
        base_general: to the general questions; none where none were asked.
    """

    model_config = ConfigDict(frozen=True)

    base: EvaluationReport
    base_results: tuple[ExampleResult, ...]
    base_general: tuple[ExampleResult, ...]
    merged: Qualified


class Registered(BaseModel):
    """Result of the stage `register`.

    Attributes:
        failed: what the version failed; it was registered all the same.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    number: int
    failed: tuple[str, ...]

    @property
    def version(self) -> VersionId:
        """The version that was made."""
        return VersionId(self.name, self.number)
