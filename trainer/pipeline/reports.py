"""Sends a run's curves and metrics to Weights & Biases and TensorBoard, in addition to MLflow.

The callbacks in transformers are not used, because they cover only training, not the evaluation that follows. The W&B
callback also starts a new run when training is resumed, and sends the model's complete configuration. Both packages are
optional.
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
from trainer.recipe.recipe import ReportTo

_OFFLINE = {"offline", "disabled", "dryrun"}
_RUN_ID = "wandb_run_id"
Report = Callable[[int, Mapping[str, float]], None]
"""Callback that receives metrics and the optimizer step to which they belong."""


def check_reports(wanted: tuple[ReportTo, ...]) -> None:
    """Check before the first stage that the packages and keys of the requested trackers are available.

    Raises:
        RecipeError: a package is not installed, or W&B has no key and is not offline.
    """
    for tracker in wanted:
        if tracker is not ReportTo.MLFLOW and find_spec(tracker.value) is None:
            raise RecipeError(
                f"report_to contains {tracker.value}, but its package is not installed",
                expected=f"the extra `{tracker.value}`",
                todo=f"pip install 'tuneserve[{tracker.value}]', or remove {tracker.value} from report_to",
            )
    if ReportTo.WANDB in wanted and os.environ.get("WANDB_MODE", "online") not in _OFFLINE:
        import wandb

        if not wandb.api.api_key:
            raise RecipeError(
                "report_to contains wandb, but W&B has no API key",
                expected="WANDB_API_KEY, or WANDB_MODE=offline, which sends nothing",
                todo="set WANDB_API_KEY or WANDB_MODE=offline, or run `wandb login`",
            )


@contextmanager
def open_reports(
    wanted: tuple[ReportTo, ...], folder: Path, name: str, run: str, parameters: dict[str, str]
) -> Iterator[list[Report]]:
    """Open the trackers that the recipe names in addition to MLflow, and close them after the `with` block.

    Args:
        folder: folder for the trackers' files. A resumed run reuses this folder.
        name: name of the model.
        run: name of the run.
        parameters: the recipe's values that affect the result.
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
    """Open a W&B run, or resume the W&B run that an earlier process opened for the same training run.

    Key, entity, project and mode are taken from W&B's own environment variables. Only parameters and metrics
    are sent: no code, no Git state, no terminal output, and no system metrics.
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
        # W&B counts calls itself and rejects earlier steps, so the optimizer's step is logged as a figure.
        yield lambda step, figures: started.log({**figures, "step": step})
    finally:
        started.finish()


@contextmanager
def _tensorboard(folder: Path, parameters: dict[str, str]) -> Iterator[Report]:
    """Open a TensorBoard event file for this process. Events that a killed process wrote after its last
    checkpoint are discarded.
    """
    writer: Any = None

    def report(step: int, figures: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:  # events from this process's first step on are discarded
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
