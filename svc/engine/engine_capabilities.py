"""Optional capabilities of an engine. The capabilities of the machine and the installed vLLM are in device.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """Optional capabilities of an engine, on which rollout, verification and qualification depend.

    The type of an engine determines whether it outlives its server and can be adopted; see
    svc.engine.engine.LastingEngine.

    Attributes:
        reloads: whether different weights of the same shapes can be loaded in place.
        adapters: maximum number of adapters loaded along with the base model, or 0 if adapters are not
            supported.
        unprobed: reason why prompt log-probabilities, and therefore probes, are unavailable, or None if they are
            available.
        sleeps: whether the engine can free its GPU while idle and restore itself later.
    """

    reloads: bool = True
    adapters: int = 0
    unprobed: str | None = None
    sleeps: bool = False
