"""What the server runs on, as metrics: its release and engine, its own process, the disk of its home."""

import shutil
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from svc.engine.device import DeviceCapabilities
from svc.settings import EngineSettings


def add_machine_metrics(
    registry: CollectorRegistry, home: Path, capabilities: DeviceCapabilities, settings: EngineSettings
) -> None:
    """Register them; the disk is asked at each scrape.

    Args:
        home: the folder of all state; it exists.
        capabilities: of this device and the vLLM on it.
        settings: of the engine.
    """
    ProcessCollector(registry=registry)
    build = Gauge("svc_build_info", "1 for what is installed", ("release", "engine", "device"), registry=registry)
    build.labels(version("tuneserve"), f"vllm {capabilities.vllm}", capabilities.device(settings).value).set(1)
    size = Gauge("svc_home_size_bytes", "Size of the disk that holds the home", registry=registry)
    size.set_function(lambda: shutil.disk_usage(home).total)
    free = Gauge("svc_home_free_bytes", "Free on the disk that holds the home", registry=registry)
    free.set_function(lambda: shutil.disk_usage(home).free)
