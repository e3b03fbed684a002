"""Determines from the settings which resources engines need, and asks the Ray cluster whether it has these
resources."""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from serving.engines.ray.cluster import RayCluster
from serving.engines.ray.cluster_query import Described
from serving.engines.ray.engine import Placement
from svc.engine.device import DeviceCapabilities
from svc.engine.vllm.user_args import given
from svc.errors import SettingsError
from svc.ray.cluster import find_address
from svc.ray.need import Need
from svc.settings.engine import Device, EngineSettings, Launcher
from svc.settings.settings import Settings

log = logging.getLogger(__name__)


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
        """Check that engines can run in the cluster, if any model's engines are configured to run there. This can take
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
                todo="set artifacts.url, and upload the versions that exist only here: svc models push NAME@N",
            )
        if find_spec("ray") is None:
            raise SettingsError("engine.launcher is ray, but Ray is not installed", todo="pip install 'tuneserve[ray]'")
        for each in used:
            self._describe(each)

    def placement(self, settings: EngineSettings) -> Placement:
        """Return the placement of an engine with these settings. This raises the same errors as `check`, and can
        also take several seconds.
        """
        return Placement(self._cluster, self._describe(settings).need, self._settings, self._models)

    def capabilities(self, settings: EngineSettings) -> DeviceCapabilities:
        """Return the capabilities of a machine in the cluster that can run engines with these settings. This raises
        the same errors as `check`, and can also take several seconds.
        """
        return self._describe(settings).capabilities

    async def shortage(self, engines: Sequence[EngineSettings]) -> str | None:
        """Return a message if the cluster has too few free resources for more engines, or None if it has enough.

        This takes several seconds, or up to `ray.wait_s` if the cluster has too few free resources but adds machines on
        demand.

        Args:
            engines: settings of each engine.

        Raises:
            EngineError: the cluster cannot be reached.
        """
        needs = [(await asyncio.to_thread(self._describe, settings)).need for settings in engines]
        resources, wait_s = await self._cluster.resources(), self._settings.ray.wait_s
        fitting = count_fitting(needs, resources.free)
        if fitting == len(needs):
            return None
        missing = _missing(needs, fitting)
        if not resources.grows:
            return missing
        log.info("waiting up to %.0f s for new machines: %s", wait_s, missing)
        began = time.monotonic()
        grown = await self._cluster.grow(needs, wait_s)
        took_s = time.monotonic() - began
        log.info("waited %.0f s for new machines: %s", took_s, "added" if grown else "none was added")
        if grown:
            return None
        if took_s < wait_s:  # the autoscaler reported that it cannot add them
            return f"{missing}, and cannot add suitable machines"
        return f"{missing}, and added no suitable machines within {wait_s:g} s (ray.wait_s)"

    def _describe(self, settings: EngineSettings) -> Described:
        needs, ray = self._needs(settings), self._settings.ray
        with self._asking:
            if needs not in self._described:
                log.info(
                    "asking the Ray cluster for a machine with %s; waiting up to %.0f s if it adds machines on demand",
                    " or ".join(map(str, needs)),
                    ray.wait_s,
                )
                self._described[needs] = self._cluster.describe(needs, str(ray.folder), ray.wait_s)
            return self._described[needs]

    def _needs(self, settings: EngineSettings) -> tuple[Need, ...]:
        """Return alternative sets of resources for an engine, in order of preference."""
        backend = given(settings.args, "--distributed-executor-backend")
        if backend == "ray":
            raise SettingsError(
                "engine.args selects vLLM's own Ray executor, but an engine runs on one machine of the cluster",
                expected="a machine with as many GPUs as the model needs",
                todo="remove --distributed-executor-backend from engine.args",
            )
        stages = given(settings.args, "--pipeline-parallel-size", "-pp") or "1"
        gpus = (settings.tensor_parallel or 1) * (int(stages) if stages.isdecimal() else 1)
        on_gpu = Need(gpus=gpus, gpu_type=self._settings.ray.gpu_type)
        on_cpu = Need(settings.cores or self._settings.ray.cpus)
        by_device = {Device.CPU: (on_cpu,), Device.CUDA: (on_gpu,), Device.AUTO: (on_gpu, on_cpu)}
        return by_device[settings.device]


def _missing(needs: Sequence[Need], fitting: int) -> str:
    """Return a message saying how many of the engines fit in the cluster."""
    kinds = Counter(needs)
    if len(needs) == 1:
        return f"one more engine needs {needs[0]}, but the Ray cluster does not have these resources free"
    if len(kinds) == 1:
        more = f"{len(needs)} more engines need {needs[0]} each"
    else:
        more = f"{len(needs)} more engines need {', '.join(f'{count} x {need}' for need, count in kinds.items())}"
    enough = f"only {fitting}" if fitting else "none"
    return f"{more}, but the Ray cluster has enough free resources for {enough} of them"


def count_fitting(needs: Sequence[Need], free: Sequence[Mapping[str, float]]) -> int:
    """Return how many of the engines fit on a cluster's machines at the same time.

    The largest engines are placed first, each on the machine with the fewest free resources among those where it fits.
    If the engines' sizes divide each other, as 1, 2, 4 and 8 GPUs do, this places all engines whenever that is
    possible.

    Args:
        free: free resources of each machine.
    """
    left = [dict(machine) for machine in free]
    fitting = 0
    for need in sorted(needs, key=lambda need: max(need.resources.values()), reverse=True):
        machines = [machine for machine in left if need.count_in(machine)]
        if machines:
            machine = min(machines, key=lambda machine: [machine[name] for name in need.resources])
            for name, amount in need.resources.items():
                machine[name] -= amount
            fitting += 1
    return fitting
