"""States of an engine, and phases of its start."""

from enum import StrEnum


class EngineState(StrEnum):
    """The states of one engine; a request is admitted in `ready` only."""

    STARTING = "starting"
    READY = "ready"
    SWAPPING = "swapping"
    DRAINING = "draining"
    RETIRING = "retiring"
    """Another engine has replaced it; it answers its last requests."""
    IDLE = "idle"
    """Without requests: it was stopped, or sleeps on its GPU; the next request restores it."""
    STOPPED = "stopped"
    FAILED = "failed"


class EnginePhase(StrEnum):
    """The phases of a start, in order. The value is the text for people."""

    PYTHON = "starting Python"
    ARGUMENTS = "reading arguments"
    CORE = "starting the engine core"
    WEIGHTS = "loading weights"
    CACHE = "allocating the key-value cache"
    WARM_UP = "warming up"
    SOCKET = "opening the socket"
