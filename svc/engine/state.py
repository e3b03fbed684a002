"""Where an engine is in its life, and how far a start has come."""

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


class EnginePhase(StrEnum):
    """The phases of a start, in their order. The value is what a person reads."""

    PYTHON = "starting Python"
    ARGUMENTS = "reading arguments"
    CORE = "starting the engine core"
    WEIGHTS = "loading weights"
    CACHE = "making room for keys and values"
    WARM_UP = "warming up"
    SOCKET = "opening the socket"
