"""A summary of a training without what depends on clock and process: two runs that are equal have equal ones."""

from dataclasses import replace

from trainer.training.summary import TrainingSummary


def without_clock(summary: TrainingSummary) -> TrainingSummary:
    """Leaves out seconds, tokens a second of the run and of each step, and the process's memory."""
    points = tuple(point.model_copy(update={"tokens_per_second": None}) for point in summary.points)
    return replace(summary, seconds=0, tokens_per_second=0, peak_memory=0, points=points)
