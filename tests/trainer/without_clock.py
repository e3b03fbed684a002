"""Training summaries without clock- or process-dependent values, so that equal runs have equal summaries."""

from dataclasses import replace

from trainer.training.summary import TrainingSummary


def without_clock(summary: TrainingSummary) -> TrainingSummary:
    """Return the summary without durations, tokens per second of the run and its steps, and process memory."""
    points = tuple(point.model_copy(update={"tokens_per_second": None}) for point in summary.points)
    return replace(summary, seconds=0, tokens_per_second=0, peak_memory=0, points=points)
