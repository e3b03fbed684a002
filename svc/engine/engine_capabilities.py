"""Capabilities of one engine beyond serving requests. device.py has those of the device and installed vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """One engine's capabilities, on which rollout, verification and qualification depend.

    Whether an engine outlives its server and can be adopted follows from its type; see
    svc.engine.engine.LastingEngine.

    Attributes:
        reloads: whether different weights of the same shapes can be loaded in place.
        adapters: maximum number of adapters loaded with its base, or 0 if adapters are not supported.
        unprobed: why log-probabilities of a prompt, and therefore probes, are unavailable; None if they are
            available.
        sleeps: whether it can free its GPU while idle and restore itself later.
    """

    reloads: bool = True
    adapters: int = 0
    unprobed: str | None = None
    sleeps: bool = False
