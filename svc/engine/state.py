"""Engine states, and the phases of an engine's start."""

from enum import StrEnum


class EngineState(StrEnum):
    """State of an engine. Requests are admitted only in the `ready` state."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    RETIRING = "retiring"
    """Replaced by another engine, but still completing its last requests."""
    IDLE = "idle"
    """Stopped, or asleep on its GPU, because there are no requests. The next request restores it."""
    STOPPED = "stopped"
    FAILED = "failed"


class EnginePhase(StrEnum):
    """Phases of an engine's start, in order. Each value is the text to display."""

    PYTHON = "starting Python"
    ARGUMENTS = "reading arguments"
    CORE = "starting the engine core"
    WEIGHTS = "loading weights"
    CACHE = "allocating the key-value cache"
    WARM_UP = "warming up"
    SOCKET = "opening the socket"
