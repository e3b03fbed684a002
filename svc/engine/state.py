"""States of an engine, and phases of its start."""

from enum import StrEnum


class EngineState(StrEnum):
    """State of one engine; requests are admitted only in `ready`."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    RETIRING = "retiring"
    """Replaced by another engine; completes its last requests."""
    IDLE = "idle"
    """Stopped, or asleep on its GPU, for lack of requests; the next request restores it."""
    STOPPED = "stopped"
    FAILED = "failed"


class EnginePhase(StrEnum):
    """Phase of an engine's start, in order. The value is the displayed text."""

    PYTHON = "starting Python"
    ARGUMENTS = "reading arguments"
    CORE = "starting the engine core"
    WEIGHTS = "loading weights"
    CACHE = "allocating the key-value cache"
    WARM_UP = "warming up"
    SOCKET = "opening the socket"
