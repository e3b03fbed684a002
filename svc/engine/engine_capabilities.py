"""What one engine can do beyond answering requests. What this device and the installed vLLM can do: capabilities.py."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """By these a rollout, a verification and a qualification choose their way.

    Whether an engine outlives its server and can be adopted is its type: svc.engine.engine.LastingEngine.

    Attributes:
        reloads: other weights of the same shapes can be loaded into it in place.
        adapters: most that it has loaded beside its base, while it runs; 0: it takes none.
        unprobed: why it cannot be asked for log-probabilities of a prompt, and so not be verified by probes; None where
            it can.
        sleeps: it can free its GPU while nobody asks, and take it again.
    """

    reloads: bool = True
    adapters: int = 0
    unprobed: str | None = None
    sleeps: bool = False
