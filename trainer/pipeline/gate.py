"""Applies a version's gates: prints how large a drop in quality each gate can detect, and fails or warns according to
the gate's verdict.
"""

from svc.errors import TrainingError
from svc.evaluation.metrics.metric import Metric, Unit
from svc.evaluation.verdict import Gate, GateOutcome, GateReport
from svc.sample_size import about, examples_needed, say_detectable
from svc.terminal import console
from svc.version import QUANTIZED_FORMATS, SERVED_FORMATS, Format
from trainer.pipeline.examples import Examples
from trainer.recipe.evaluate import Undecided
from trainer.recipe.recipe import Recipe

_QUANTIZE_BETTER = (
    "raise quantize.samples, lower quantize.group_size to 32, or serve only the merged model with `formats: [merged]`; "
    "training is not repeated"
)
_OTHER_FORMAT = "serve another format: remove {} from `formats`; training is not repeated"
_TRAIN_LESS = (
    "lower train.learning_rate, adapter.rank or train.epochs, or mix in data.general; if only GPTQ fails, raise "
    "quantize.samples, or lower quantize.group_size to 32"
)
_HOLD_OUT_MORE = "hold out more examples: data.heldout, data.heldout_share or evaluate.limit"
_ASK_MORE = "ask more questions: evaluate.general_limit, or a larger file in evaluate.general"


def check_gate(report: GateReport, undecided: Undecided) -> None:
    """Raise an error if a gate failed, and warn if it is undecided.

    Args:
        undecided: the recipe's `evaluate.undecided`.

    Raises:
        TrainingError: the gate failed, or it is undecided and `evaluate.undecided` is `fail`.
    """
    outcome, allowed = report.verdict.outcome, f"at most {report.verdict.margin:.3f} ({report.limit})"
    if outcome is GateOutcome.FAILED:
        other = report.format in (Format.INT8, Format.FP8)  # rounding has no options
        todo = _OTHER_FORMAT.format(report.format) if other else _QUANTIZE_BETTER
        todo = _TRAIN_LESS if report.gate is Gate.FORGETTING else todo
        raise TrainingError(str(report), expected=allowed, todo=todo)
    if outcome is not GateOutcome.UNDECIDED:
        return
    if undecided is Undecided.FAIL:
        more = _ASK_MORE if report.gate is Gate.FORGETTING else _HOLD_OUT_MORE
        raise TrainingError(
            str(report),
            expected=f"{allowed}, and enough examples to rule out a larger loss, because "
            f"evaluate.undecided is {undecided}",
            todo=f"{more}; or set evaluate.undecided to {Undecided.WARN}",
        )
    console.print(f"[yellow]{report}[/yellow]", soft_wrap=True)


def say_gates(recipe: Recipe, examples: Examples, primary: Metric) -> None:
    """For each gate on a share of answers, print the smallest difference between a quality loss and the gate's limit
    that the available number of examples can detect.
    """
    limits = recipe.evaluate
    formats = set(recipe.formats)
    quantized = not formats.isdisjoint(QUANTIZED_FORMATS)
    if Format.MERGED in formats and quantized and primary.unit is Unit.SHARE:
        asked = len(examples.heldout[: limits.limit])
        _say(Gate.GPTQ_LOSS, asked, "held-out examples", limits.max_gptq_loss)
    if examples.questions and limits.max_forgetting is not None and not formats.isdisjoint(SERVED_FORMATS):
        _say(Gate.FORGETTING, len(examples.questions.examples), "general questions", limits.max_forgetting)


def _say(gate: Gate, asked: int, counted: str, margin: float) -> None:
    if margin >= 1:  # no loss exceeds it
        return
    needed = f": about {about(examples_needed(margin))} are needed to pass a version without loss" if margin > 0 else ""
    console.print(f"  {say_detectable(asked, counted)}; evaluate.{gate} is {margin:g}{needed}", soft_wrap=True)
