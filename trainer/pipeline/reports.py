"""Where a run's curves and figures go beside MLflow: Weights & Biases, TensorBoard.

transformers' own callbacks are not used: they see the training alone and not what is evaluated after it, W&B's begins
another run when a training goes on, and sends the model's whole configuration. Both packages are optional.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from svc.errors import RecipeError
from svc.files.disk import write_whole
from trainer.recipe.sections import ReportTo

_OFFLINE = {"offline", "disabled", "dryrun"}
_RUN_ID = "wandb_run_id"


Report = Callable[[int, Mapping[str, float]], None]
"""Takes figures at a step of the optimizer."""


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
) -> Iterator[list[Report]]:
    """Open the reports that the recipe names beside MLflow, for the body.

    Args:
        folder: the run's own, for all that is written; a run that goes on is found in it.
        name: of the model.
        run: of the run.
        parameters: what decides the result.
    """
    with ExitStack() as stack:
        reports = []
        if ReportTo.WANDB in wanted:
            reports.append(stack.enter_context(_wandb_run(folder, name, run, parameters)))
        if ReportTo.TENSORBOARD in wanted:
            reports.append(stack.enter_context(_tensorboard(folder / "tensorboard", parameters)))
        yield reports


@contextmanager
def _wandb_run(folder: Path, name: str, run: str, parameters: dict[str, str]) -> Iterator[Report]:
    """Open one run of W&B, which goes on where the same training had one before.

    Key, entity, project and mode are W&B's own variables. Nothing but parameters and figures is sent: no code, no Git
    state, no output of the terminal, no load of the machine.
    """
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / _RUN_ID
    if not stored.is_file():
        write_whole(stored, secrets.token_hex(4).encode())
    quiet = wandb.Settings(
        console="off", silent=True, disable_git=True, disable_code=True, save_code=False, x_disable_stats=True
    )
    started = wandb.init(
        project=os.environ.get("WANDB_PROJECT", name),
        name=run,
        id=stored.read_text("utf-8"),
        resume=None if os.environ.get("WANDB_MODE") in _OFFLINE else "allow",
        dir=folder,
        config=parameters,
        settings=quiet,
    )
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    try:
        # W&B counts calls itself, and refuses to go back: the optimizer's step is a figure of its own.
        yield lambda step, figures: started.log({**figures, "step": step})
    finally:
        started.finish()


@contextmanager
def _tensorboard(folder: Path, parameters: dict[str, str]) -> Iterator[Report]:
    """Open an event file for this process; what a killed one wrote beyond its last checkpoint is discarded."""
    writer: Any = None

    def report(step: int, figures: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:  # the first step of this process says what is discarded
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=step)
            lines = (f"| {key} | {value} |" for key, value in parameters.items())
            writer.add_text("parameters", "\n".join(["| key | value |", "| --- | --- |", *lines]), step)
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    try:
        yield report
    finally:
        if writer is not None:
            writer.close()
