"""What the trials of one command share: folder, lock, data as token ids, base, runs in MLflow.

$SVC_HOME/sweeps/NAME-KEY/   lock  mlflow.json  base.json  trials/KEY/  study.db  result.json  winner.yaml
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from svc.chat_template import choose_template_kwargs
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.disk import write_whole
from svc.engine.capabilities import Capabilities
from svc.errors import InterruptedRunError
from svc.evaluation.estimate import Estimate
from svc.json_file import read_json_object
from svc.lock import hold_lock
from svc.registry.tracking import Tracking
from svc.terminal import console
from svc.training_runs import RUN_LOCK
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.pipeline.stage_key import stage_keys
from trainer.recipe.sections import Recipe
from trainer.recipe.stage import Stage
from trainer.sweep.trial import MlflowRuns, Train, Trials, heldout_loss

if TYPE_CHECKING:
    from trainer.training.loaded_base import LoadedBase
    from trainer.training.trial import TrialData

_Sampled = TypeVar("_Sampled")
_JUDGED, _WATCHED = 200, 64
"""Most held-out examples that trials are judged by, and that are measured while they train."""


@dataclass(frozen=True)
class Workplace:
    """One command's.

    Args:
        folder: found again by a command with the same recipe, data and base.
        train: trains one trial; default: for real.
    """

    folder: Path
    experiment: str
    recipe: Recipe
    base: Base
    examples: Examples
    tracking: Tracking
    capabilities: Capabilities
    train: Train | None = None

    @classmethod
    def of(
        cls,
        sweeps: Path,
        kind: str,
        recipe: Recipe,
        base: Base,
        examples: Examples,
        tracking: Tracking,
        capabilities: Capabilities,
    ) -> "Workplace":
        """The one that a recipe means.

        Args:
            kind: `sweep` or `curve`.
        """
        said = [kind, stage_keys(recipe, base, examples)[Stage.TRAIN], examples.heldout_fingerprint]
        said.append(recipe.sweep.model_dump_json())
        key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        folder, experiment = sweeps / f"{recipe.name}-{key}", f"{recipe.name}-{kind}"
        return cls(folder, experiment, recipe, base, examples, tracking, capabilities)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Works in it alone.

        Raises:
            BusyError: another process does.
            InterruptedRunError: Ctrl-C or SIGTERM between two trainings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.folder / RUN_LOCK, f"the trials in {self.folder.name}"):
            try:
                yield
            except KeyboardInterrupt as error:
                raise InterruptedRunError(
                    "the trials were interrupted", todo="run the same command again: what is done is kept"
                ) from error

    @cached_property
    def parent(self) -> str:
        """The run in MLflow that the trials' runs are below."""
        return self._runs.of(self.folder, self.folder.name, {"tuneserve.base": self.base.origin})

    @cached_property
    def loaded(self) -> "LoadedBase":
        """The base, read once."""
        from trainer.training.loaded_base import LoadedBase

        return LoadedBase(self.base.folder)

    @cached_property
    def data(self) -> "TrialData":
        """The examples as token ids; of held-out ones a random sample where there are many."""
        from trainer.training.trial import TrialData

        drawn = random.Random(0)  # noqa: S311 - no secret
        heldout = self._tokenize(_sample(self.examples.heldout, _JUDGED, drawn))
        watched = _sample(heldout, _WATCHED, drawn)
        return TrialData(
            self._tokenize(self.examples.train), sorted(watched, key=_length), sorted(heldout, key=_length)
        )

    @cached_property
    def trials(self) -> Trials:
        """Trains, or finds what was trained."""
        return Trials(
            self.recipe,
            self.loaded,
            self.data,
            self.folder / "trials",
            self._runs,
            self.parent,
            self.capabilities.training_type,
            self.train,
        )

    def base_loss(self) -> Estimate:
        """Of the base, measured once."""
        from trainer.training.trial import untrained_losses

        path = self.folder / "base.json"
        if not path.is_file():
            console.print("  held-out loss of the base")
            each = untrained_losses(
                self.loaded, self.data, self.recipe, self.folder / "base", number_type=self.capabilities.training_type
            )
            write_whole(path, json.dumps({"heldout_each": each}).encode("utf-8"))
        return heldout_loss(self.data, read_json_object(path)["heldout_each"])

    def publish(self, figures: Mapping[str, float], *files: Path) -> None:
        """Adds a result to the run in MLflow, and ends that."""
        self.tracking.log_metrics(self.parent, dict(figures))
        for file in files:
            self.tracking.log_file(self.parent, file)
        self.tracking.end_run(self.parent)

    @property
    def _runs(self) -> MlflowRuns:
        return MlflowRuns(self.tracking, self.experiment)

    def _tokenize(self, examples: Sequence[ChatExample]) -> list[TokenizedExample]:
        from trainer.data.chat_template import stop_tokens, tokenize_examples

        kwargs = choose_template_kwargs(self.base.folder, self.recipe.chat_template_kwargs)
        tokenizer = self.loaded.tokenizer
        return tokenize_examples(tokenizer, examples, stop_tokens(self.base.folder, tokenizer), kwargs)


def _sample(values: Sequence[_Sampled], most: int, drawn: random.Random) -> list[_Sampled]:
    return list(values) if len(values) <= most else drawn.sample(list(values), most)


def _length(row: TokenizedExample) -> int:
    return len(row.input_ids)
