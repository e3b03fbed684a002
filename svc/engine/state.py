"""States of an engine, and the phases of its startup."""

from enum import StrEnum


class EngineState(StrEnum):
    """State of an engine. Only an engine in the `ready` state accepts requests."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    RETIRING = "retiring"
    """Replaced by another engine, but still finishing its last requests."""
    IDLE = "idle"
    """Stopped or put to sleep after a period without requests. The next request starts or wakes it."""
    STOPPED = "stopped"
    FAILED = "failed"


class EnginePhase(StrEnum):
    """Phases of engine startup, in order. The values are display texts."""

    PYTHON = "starting Python"
    ARGUMENTS = "reading arguments"
    CORE = "starting the engine core"
    WEIGHTS = "loading weights"
    CACHE = "allocating the key-value cache"
    WARM_UP = "warming up"
    SOCKET = "opening the socket"
