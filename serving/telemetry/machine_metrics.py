"""What the server runs on, as metrics: its release and engine, its own process, the disk of its home."""

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from svc.engine.device import DeviceCapabilities
from svc.settings import EngineSettings


def add_machine_metrics(
    registry: CollectorRegistry, home: Path, capabilities: DeviceCapabilities, settings: EngineSettings
) -> None:
    """Registers them; the disk is asked at each scrape.

    Args:
        home: the folder of all state; it exists.
        capabilities: of this device and the vLLM on it.
        settings: of the engine.
    """
    ProcessCollector(registry=registry)
    build = Gauge("svc_build_info", "1 for what is installed", ("release", "engine", "device"), registry=registry)
    device = capabilities.device(settings)
    build.labels(version("tuneserve"), f"vllm {capabilities.vllm}", device.value).set(1)
    _disk(
        registry, "svc_home_size_bytes", "Size of the disk that holds the home", lambda: shutil.disk_usage(home).total
    )
    _disk(registry, "svc_home_free_bytes", "Free on the disk that holds the home", lambda: shutil.disk_usage(home).free)


def _disk(registry: CollectorRegistry, name: str, documentation: str, read: Callable[[], int]) -> None:
    Gauge(name, documentation, registry=registry).set_function(lambda: float(read()))
