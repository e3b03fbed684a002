"""Events with the metrics of a job's steps are few, and have the last step and the held-out losses."""

import pytest

from serving.fine_tuning.queue import JobNews, Reported
from serving.fine_tuning.step_events import MAX_EVENTS, StepEvents
from svc.training_progress import HeldoutLoss, StepDone


def step(number: int, of: int = 10, accuracy: float | None = None) -> StepDone:
    return StepDone(step=number, steps=of, epoch=number / of, loss=2.0, accuracy=accuracy, tokens=9)


def test_only_the_newest_of_several_new_training_steps_is_reported() -> None:
    events = StepEvents(Reported(0, 0))
    events.add([step(1), step(2, accuracy=0.5)])
    metrics = {"step": 2, "total_steps": 10, "train_loss": 2.0, "train_mean_token_accuracy": 0.5}
    assert events.next() == JobNews("Step 2/10: training loss=2.00", metrics)
    assert events.next() is None


def test_held_out_loss_creates_an_event_even_if_its_step_was_already_reported() -> None:
    events = StepEvents(Reported(0, 0))
    events.add([step(4)])
    events.next()
    events.add([HeldoutLoss(step=4, loss=1.5, accuracy=0.25), step(5)])
    valid = {"step": 4, "total_steps": 10, "valid_loss": 1.5, "valid_mean_token_accuracy": 0.25}
    assert events.next() == JobNews("Step 4/10: validation loss=1.50", valid)
    assert (event := events.next()) is not None
    assert event.message == "Step 5/10: training loss=2.00"


def test_training_and_held_out_loss_of_a_step_are_reported_in_one_event() -> None:
    events = StepEvents(Reported(0, 0))
    events.add([step(4), HeldoutLoss(step=4, loss=1.5)])
    assert (event := events.next()) is not None
    assert event.message == "Step 4/10: training loss=2.00, validation loss=1.50"
    assert events.next() is None


def test_already_reported_steps_create_no_duplicate_events_when_job_tracking_resumes() -> None:
    events = StepEvents(Reported(3, 5))
    events.add([step(4), HeldoutLoss(step=5, loss=1.5), step(5)])
    assert events.next(last=True) is None


@pytest.mark.slow
def test_long_training_run_has_few_events_including_one_for_its_last_step() -> None:
    events, steps = StepEvents(Reported(0, 0)), 20_000
    messages = []
    for number in range(1, steps + 1):
        measured = [HeldoutLoss(step=number, loss=1.0)] if number % 10 == 0 else []
        events.add([step(number, steps), *measured])
        if event := events.next():
            messages.append(event.message)
    last = events.next(last=True)
    assert last is not None
    assert last.message == "Step 20000/20000: training loss=2.00, validation loss=1.00"
    assert len(messages) == MAX_EVENTS - 1


def test_training_run_of_a_few_hundred_steps_has_an_event_for_every_step() -> None:
    events = StepEvents(Reported(0, 0))
    count = 0
    for number in range(1, 401):
        events.add([step(number, 400)])
        count += events.next() is not None
    assert count == 400
