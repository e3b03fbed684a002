"""Measured step times for tests, with round numbers."""

from datetime import UTC, datetime

from serving.sizing.service_times import MeasuredTimes, Point


def make_times(
    *, step_s: float = 0.01, token_s: float = 0.0001, overhead_s: float = 0.0, slope_s: float = 0.0
) -> MeasuredTimes:
    """Return times of an engine whose steps take `step_s`, plus `slope_s` for each further running answer.

    Args:
        token_s: seconds for each token of a prompt.
        overhead_s: seconds that a request spends outside the engine.
    """
    return MeasuredTimes(
        model="test",
        measured_at=datetime(2026, 12, 1, tzinfo=UTC),
        prompt=100,
        answer=20,
        decoding=(Point(count=1, seconds=step_s), Point(count=65, seconds=step_s + 64 * slope_s)),
        prefill=tuple(Point(count=n, seconds=overhead_s + step_s + n * token_s) for n in (10, 100)),
    )
