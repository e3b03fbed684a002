"""Capabilities of one engine beyond answering requests. Those of the device and the installed vLLM are in device.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """One engine's capabilities, on which rollout, verification and qualification depend.

    Whether an engine outlives its server and can be adopted follows from its type: svc.engine.engine.LastingEngine.

    Attributes:
        reloads: whether other weights of the same shapes can be loaded in place.
        adapters: maximum number of adapters loaded with its base; 0: no support for adapters.
        unprobed: reason why log-probabilities of a prompt, and so probes, are unavailable; None
            if they are available.
        sleeps: whether it can free its GPU while idle, and restore itself.
    """

    reloads: bool = True
    adapters: int = 0
    unprobed: str | None = None
    sleeps: bool = False
