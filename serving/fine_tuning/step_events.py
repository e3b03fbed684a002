"""Events that report the metrics of a job's steps under OpenAI's names. In long training runs, only some steps get an
event."""

from collections.abc import Iterable
from typing import Any

from serving.fine_tuning.queue import JobNews, Reported
from svc.training_progress import HeldoutLoss, ProgressRecord, StepDone

MAX_EVENTS = 500
"""Maximum number of events with metrics per job."""
_SPARE = 100
"""Number of events, out of `MAX_EVENTS`, that are reserved for held-out losses and resumed training runs."""


class StepEvents:
    """Chooses the steps of a job for which events are created.

    Args:
        reported: summary of the steps that were already reported.
    """

    def __init__(self, reported: Reported) -> None:
        self._count, self._step, self._measured = reported.events, reported.step, reported.step
        self._steps = dict[int, StepDone]()
        self._heldout = dict[int, HeldoutLoss]()
        self._total = 0

    def add(self, records: Iterable[ProgressRecord]) -> None:
        """Process the progress records that the training has written since the last call."""
        for record in records:
            if isinstance(record, StepDone):
                self._steps[record.step], self._total = record, record.steps
            elif isinstance(record, HeldoutLoss):
                self._heldout[record.step] = record
        newest, measured = max(self._steps, default=0), max(self._heldout, default=0)
        # Older ones get no event. After the last event, a long training run would fill the dicts.
        self._steps = {each: record for each, record in self._steps.items() if each in (newest, measured)}
        self._heldout = {each: record for each, record in self._heldout.items() if each == measured}

    def next(self, *, last: bool = False) -> JobNews | None:
        """Return the next event, or None if there is none yet. A measured held-out loss is returned before newer steps.

        Args:
            last: whether the training has ended. If so, its last step gets an event.
        """
        step = self._choose(last=last)
        if step is None:
            return None
        event = self._event(step)
        self._step, self._measured = max(self._step, step), max(self._measured, step if step in self._heldout else 0)
        self._steps = {each: record for each, record in self._steps.items() if each > self._step}
        self._count += 1
        return event

    def _choose(self, *, last: bool) -> int | None:
        newest = max((step for step in self._steps if step > self._step), default=None)
        measured = max((step for step in self._heldout if step > self._measured), default=None)
        if self._count >= MAX_EVENTS - 1 and not (last and self._count < MAX_EVENTS):
            return None  # the last event is for the last step
        if measured is not None:
            return measured
        stride = -(-self._total // (MAX_EVENTS - _SPARE))
        return newest if newest is not None and (last or newest >= self._step + stride) else None

    def _event(self, step: int) -> JobNews:
        metrics: dict[str, Any] = {"step": step, "total_steps": self._total}
        losses = []
        if done := self._steps.get(step):
            metrics["train_loss"] = done.loss
            losses.append(f"training loss={done.loss:.2f}")
            if done.accuracy is not None:
                metrics["train_mean_token_accuracy"] = done.accuracy
        if heldout := self._heldout.get(step):
            metrics["valid_loss"] = heldout.loss
            losses.append(f"validation loss={heldout.loss:.2f}")
            if heldout.accuracy is not None:
                metrics["valid_mean_token_accuracy"] = heldout.accuracy
        return JobNews(f"Step {step}/{self._total}: {', '.join(losses)}", metrics)
