"""Formats a rollout as text for `svc rollout`, `svc status`, `svc history` and version reports."""

from svc.store.rollouts import RolloutView, SignalRow

SIGNAL_COLUMNS = ("signal", "production", "candidate", "loss from", "to", "margin", "units", "verdict")


def signal_cells(signal: SignalRow) -> tuple[str, ...]:
    """Return a table row with a signal's values and verdict, in the order of `SIGNAL_COLUMNS`."""
    figures = (signal.production, signal.candidate, signal.low, signal.high)
    cells = ("" if value is None else f"{value:.3f}" for value in figures)
    return (signal.signal, *cells, f"{signal.margin:g}", str(signal.units), signal.outcome)


def place_of(rollout: RolloutView) -> str:
    """Describe a rollout's outcome or, if it has not ended, its current state or canary step."""
    if rollout.outcome is not None:
        return rollout.outcome.value.replace("_", " ")
    return rollout.state.value if rollout.canary is None else f"canary {rollout.canary:g}%"
