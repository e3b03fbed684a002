"""Where an engine is in its life."""

from enum import StrEnum


class EngineState(StrEnum):
    """The states of one engine; a request is admitted in `ready` only."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    RETIRING = "retiring"
    """Another engine took its place; it answers its last requests."""
    IDLE = "idle"
    """Nobody asks: it was ended, or sleeps on its GPU; the next request brings it back."""
    STOPPED = "stopped"
    FAILED = "failed"
