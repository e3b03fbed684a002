"""Metrics of the server's process, the installed release, engine and device, and the disk of the home folder."""

import shutil
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from svc.engine.device import DeviceCapabilities
from svc.settings.engine import EngineSettings


def add_machine_metrics(
    registry: CollectorRegistry, home: Path, capabilities: DeviceCapabilities, settings: EngineSettings
) -> None:
    """Register the metrics of the machine. Disk space is measured on each scrape.

    Args:
        home: the home folder, which must exist.
        capabilities: capabilities of this machine's device and vLLM installation.
        settings: the engine's settings.
    """
    ProcessCollector(registry=registry)
    build = Gauge(
        "svc_build_info",
        "Always 1; the labels name the installed release, the engine and the device",
        ("release", "engine", "device"),
        registry=registry,
    )
    build.labels(version("tuneserve"), f"vllm {capabilities.vllm}", capabilities.device(settings).value).set(1)
    size = Gauge("svc_home_size_bytes", "Size in bytes of the disk that holds the home", registry=registry)
    size.set_function(lambda: shutil.disk_usage(home).total)
    free = Gauge("svc_home_free_bytes", "Free space in bytes on the disk that holds the home", registry=registry)
    free.set_function(lambda: shutil.disk_usage(home).free)
