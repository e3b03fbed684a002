"""Where a run's curves and figures go beside MLflow: Weights & Biases, TensorBoard.

transformers' own callbacks are not used: they see the training alone and not what is evaluated after it, W&B's begins
another run when a training goes on, and sends the model's whole configuration. Both packages are optional.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from svc.disk import write_whole
from svc.errors import RecipeError
from trainer.recipe.sections import ReportTo

_OFFLINE = {"offline", "disabled", "dryrun"}
_RUN_ID = "wandb_run_id"


class Reporter(Protocol):
    """Takes what a run reports."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures at a step of the optimizer."""

    def close(self) -> None:
        """Nothing more comes from this process."""


def check_reports(wanted: tuple[ReportTo, ...]) -> None:
    """Looks for what is needed, before hours are spent.

    Raises:
        RecipeError: a package is not installed, or W&B has no key and is not offline.
    """
    for one in wanted:
        if one is not ReportTo.MLFLOW and find_spec(one.value) is None:
            raise RecipeError(
                f"report_to names {one.value}, and its package is not installed",
                expected=f"the extra `{one.value}`",
                todo=f"pip install 'tuneserve[{one.value}]', or leave it out of report_to",
            )
    if ReportTo.WANDB in wanted and os.environ.get("WANDB_MODE", "online") not in _OFFLINE:
        import wandb

        if not wandb.api.api_key:
            raise RecipeError(
                "report_to names wandb, which has no key",
                expected="WANDB_API_KEY, or WANDB_MODE=offline: then nothing is sent",
                todo="set one of the two, or run `wandb login`",
            )


@contextmanager
def open_reports(
    wanted: tuple[ReportTo, ...], folder: Path, name: str, run: str, parameters: dict[str, str]
) -> Iterator[list[Reporter]]:
    """What the recipe names beside MLflow, open inside.

    Args:
        folder: the run's own, for all that is written; a run that goes on is found in it.
        name: of the model.
        run: of the run.
        parameters: what decides the result.
    """
    reporters: list[Reporter] = []
    try:
        if ReportTo.WANDB in wanted:
            reporters.append(WandbReporter(folder, name, run, parameters))
        if ReportTo.TENSORBOARD in wanted:
            reporters.append(TensorBoardReporter(folder / "tensorboard", parameters))
        yield reporters
    finally:
        for reporter in reporters:
            reporter.close()


class WandbReporter:
    """One run of W&B, which goes on where the same training had one before.

    Key, entity, project and mode are W&B's own variables. Nothing but parameters and figures is sent: no code, no Git
    state, no output of the terminal, no load of the machine.
    """

    def __init__(self, folder: Path, name: str, run: str, parameters: dict[str, str]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        stored = folder / _RUN_ID
        if not stored.is_file():
            write_whole(stored, secrets.token_hex(4).encode())
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, save_code=False, x_disable_stats=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", name),
            name=run,
            id=stored.read_text("utf-8"),
            resume=None if os.environ.get("WANDB_MODE") in _OFFLINE else "allow",
            dir=folder,
            config=parameters,
            settings=quiet,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """W&B counts calls itself, and refuses to go back: the optimizer's step is a figure of its own."""
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        """Waits until all is written, and sent where it is."""
        self._run.finish()


class TensorBoardReporter:
    """An event file for each process; what a killed one wrote beyond its last checkpoint is discarded."""

    def __init__(self, folder: Path, parameters: dict[str, str]) -> None:
        self._folder = folder
        self._parameters = parameters
        self._writer: Any = None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The first step of this process says what is discarded."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            lines = (f"| {key} | {value} |" for key, value in self._parameters.items())
            self._writer.add_text("parameters", "\n".join(["| key | value |", "| --- | --- |", *lines]), step)
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()
