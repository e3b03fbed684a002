"""What a training took, beside what was estimated."""

from dataclasses import replace

from svc.terminal import console
from trainer.estimate.estimate import DeviceEstimate
from trainer.training.summary import TrainingSummary


def compare_with_real(expected: DeviceEstimate, summary: TrainingSummary) -> TrainingSummary:
    """Says both, and returns the summary with what was estimated."""
    compared = replace(summary, estimated_memory=expected.memory, estimated_seconds=expected.seconds)
    if summary.peak_memory is not None:
        console.print(
            f"  memory: {summary.peak_memory / 1e9:.2f} GB, {expected.memory / 1e9:.2f} were estimated; "
            f"time: {summary.seconds:.0f} s, {expected.seconds:.0f} were estimated"
        )
    return compared


def estimate_metrics(summary: TrainingSummary) -> dict[str, float]:
    """For the tracking server: estimated, real, and their ratios where both are known."""
    figures = {
        "estimate.memory": summary.estimated_memory,
        "estimate.memory_real": summary.peak_memory,
        "estimate.seconds": summary.estimated_seconds,
        "estimate.seconds_real": summary.seconds,
    }
    return {name: float(value) for name, value in figures.items() if value is not None}
