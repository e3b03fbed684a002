"""Derives from the settings the resources that engines need, and asks the Ray cluster whether it has them."""

import threading
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.engine.vllm.engine_args import given
from svc.errors import SettingsError
from svc.ray_cluster import find_address
from svc.ray_engine.cluster import Described, Need, RayCluster, count_fitting
from svc.ray_engine.engine import Placement
from svc.settings import Device, EngineSettings, Launcher, Settings

_SOME = 0.001
"""A machine has one unit of the resource `accelerator_type:TYPE`, regardless of how many GPUs of the type it has."""


class RayMachines:
    """The machines of a Ray cluster on which engines can run.

    Args:
        models: the registry's folder on this machine.
    """

    def __init__(self, settings: Settings, models: Path) -> None:
        self._settings = settings
        self._models = models
        self._described: dict[tuple[Need, ...], Described] = {}
        self._asking = threading.Lock()

    @cached_property
    def _cluster(self) -> RayCluster:
        return RayCluster(find_address(self._settings.ray.address))

    def check(self) -> None:
        """Check that engines can run in the cluster, if the engines of any model are configured to. This can take
        several seconds.

        Raises:
            SettingsError: a setting or package is missing.
            EngineError: the cluster cannot be reached, or has no machine for an engine.
        """
        settings = self._settings
        every = [settings.engine, *(settings.engine_for(name) for name in settings.models)]
        used = [each for each in every if each.launcher is Launcher.RAY]
        if not used:
            return
        if settings.artifacts.url is None:
            raise SettingsError(
                "engine.launcher is ray, but artifacts.url is not set, so other machines cannot download the versions",
                expected="s3://bucket/prefix, or file:///path on a file system that all machines share",
                todo="set artifacts.url, and upload the versions that are only here: svc models push NAME@N",
            )
        if find_spec("ray") is None:
            raise SettingsError("engine.launcher is ray, but Ray is not installed", todo="pip install 'tuneserve[ray]'")
        for each in used:
            self._describe(each)

    def placement(self, settings: EngineSettings) -> Placement:
        """Return where an engine with these settings runs. See `check` for errors and duration."""
        ray = self._settings.ray
        return Placement(
            cluster=self._cluster,
            need=self._describe(settings).need,
            folder=str(ray.folder),
            wait_s=ray.wait_s,
            artifacts=self._settings.artifacts.url or "",
            models=self._models,
        )

    def capabilities(self, settings: EngineSettings) -> DeviceCapabilities:
        """Return the capabilities of the machines for such engines. See `check` for errors and duration."""
        return self._describe(settings).capabilities

    def shortage(self, engines: Sequence[EngineSettings]) -> str | None:
        """Return a message if the cluster has no free resources for more engines now, or None if it has. This takes
        seconds.

        Args:
            engines: settings of each engine.
        """
        needs = [self._describe(settings).need for settings in engines]
        fitting = count_fitting(needs, self._cluster.free())
        if fitting == len(needs):
            return None
        kinds = Counter(needs)
        if len(needs) == 1:
            more = f"one more engine needs {needs[0]}"
        elif len(kinds) == 1:
            more = f"{len(needs)} more engines need {needs[0]} each"
        else:
            more = f"{len(needs)} more engines need {', '.join(f'{count} x {need}' for need, count in kinds.items())}"
        return f"{more}, but the Ray cluster has room for {f'only {fitting}' if fitting else 'none'}"

    def _describe(self, settings: EngineSettings) -> Described:
        needs = self._needs(settings)
        with self._asking:
            if needs not in self._described:
                self._described[needs] = self._cluster.describe(needs, str(self._settings.ray.folder))
            return self._described[needs]

    def _needs(self, settings: EngineSettings) -> tuple[Need, ...]:
        """Return alternative sets of resources for an engine, in order of preference."""
        backend = given(settings.args, "--distributed-executor-backend")
        if backend == "ray":
            raise SettingsError(
                "engine.args selects vLLM's own Ray executor, but an engine runs on one machine of the cluster",
                expected="as many GPUs in one machine as the model needs",
                todo="remove --distributed-executor-backend from engine.args",
            )
        stages = given(settings.args, "--pipeline-parallel-size", "-pp") or "1"
        gpus = (settings.tensor_parallel or 1) * (int(stages) if stages.isdecimal() else 1)
        kind = self._settings.ray.gpu_type
        on_gpu = Need(resources={"GPU": gpus} | ({f"accelerator_type:{kind}": _SOME} if kind else {}))
        on_cpu = Need(resources={"CPU": settings.cores or self._settings.ray.cpus})
        by_device = {Device.CPU: (on_cpu,), Device.CUDA: (on_gpu,), Device.AUTO: (on_gpu, on_cpu)}
        return by_device[settings.device]
