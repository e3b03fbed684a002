"""How one vLLM server is started: its arguments and environment, from a spec. What of them is chosen, plan.py says.

The seam for other launchers: whoever can run `command(spec)` with `environment(spec)` somewhere, and reach its HTTP
surface, has an engine.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from svc.engine.device import CPU_LIMITS, DeviceCapabilities
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.machine import read_machine
from svc.engine.model_facts import ModelFacts, read_model_facts
from svc.engine.vllm import plan
from svc.engine.vllm.choice import Choice, Origin
from svc.engine.vllm.engine_args import given, given_flag
from svc.engine.vllm.environment import inherited_environment
from svc.engine.vllm.lora import RUNTIME_VARIABLE, LoraSlots, lora_choices
from svc.engine.vllm.number_type import choose_dtype, choose_gptq_kernel
from svc.engine.vllm.plugin import EMPTY_TOKENS_VARIABLE, INT4_LINEAR_VARIABLE, LORA_VARIABLE, QUIET_VARIABLE
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings import Device, EngineSettings, GptqKernel

SOCKET_FILE = "engine.sock"
HUGGING_FACE_FORMAT = ["--config-format", "hf", "--tokenizer-mode", "hf"]
"""Mistral's folders hold a model twice: by default vLLM reads `params.json` and `tekken.json`, while training reads
`config.json` and `tokenizer.json`. `engine.args` come later, so they overrule this."""
_ENTRY, _OLD_ENTRY = "vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server"
_LISTS = ("VLLM_DISABLED_KERNELS", "VLLM_PLUGINS")
"""Variables of vLLM that hold names with commas between them."""
_OUTPUT_LAYER = "lm_head"
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"
_SLEEP_FLAG, _SLEEP_MODE = "enable-sleep-mode", "enable_sleep_mode"
_PLUGIN = "tuneserve"
"""The name of our entry point in `vllm.general_plugins`."""


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
        capabilities: of this device.
        template_kwargs: what the chat template is given; None: what the model's folder says.
        lora: room for adapters beside the model; None: it takes none.
        engines: how many share the machine, this one among them.
        idles: its model has an idle time.
    """

    model: Path
    served_name: str
    runtime: Path
    state: Path
    log: Path
    cache: Path
    capabilities: DeviceCapabilities
    settings: EngineSettings = field(default_factory=EngineSettings)
    template_kwargs: TemplateKwargs | None = None
    lora: LoraSlots | None = None
    engines: int = 1
    idles: bool = False

    @property
    def socket(self) -> Path:
        """The unix socket it listens on."""
        return self.runtime / SOCKET_FILE

    @cached_property
    def plan(self) -> plan.EnginePlan:
        """What is chosen for it, by the machine as it is when this is first asked; takes up to seconds on a GPU."""
        machine = read_machine(gpus=self.device is Device.CUDA)
        planned = plan.plan_engine(
            self.settings, self.capabilities, machine, self.facts, self.cache, engines=self.engines
        )
        lora = lora_choices(self.lora, self.settings.args) if self.lora else ()
        sleep = (_sleep_choice(self.settings.args),) if self.engine_capabilities.sleeps else ()
        return plan.EnginePlan((*planned.choices, *lora, *sleep))

    @property
    def device(self) -> Device:
        """Where it will run."""
        return self.capabilities.device(self.settings)

    @cached_property
    def engine_capabilities(self) -> EngineCapabilities:
        """What the engine will be able to do; reads the model's folder when this is first asked.

        vLLM packs experts for a CPU when it loads them, and not when it loads them again: 0.32 was off by 2.5 nats a
        token after a reload (Qwen3-MoE, Mixtral), and by 0.01 in an engine that started with the same files.
        """
        return EngineCapabilities(
            reloads=self.device is not Device.CPU or not self.facts.experts,
            adapters=self.lora.max_loaded if self.lora else 0,
            unprobed=self._unprobed(),
            # With the flag vLLM 0.32 does not start on a CPU, and takes a GPU's memory by an allocator of its own.
            sleeps=self.idles
            and self.device is Device.CUDA
            and given_flag(self.settings.args, _SLEEP_FLAG) is not False,
        )

    def _unprobed(self) -> str | None:
        """Why it cannot be probed: adapters may change the output layer. Where room for them is ours, none does."""
        args = self.settings.args
        if self.lora is None and not given_flag(args, "enable-lora"):
            return None
        every_layer = self.lora is None and given(args, "--lora-target-modules") is None
        return self.capabilities.adapters_refusal(self.settings, output_layer=every_layer or _OUTPUT_LAYER in args)

    @cached_property
    def facts(self) -> ModelFacts:
        """What its model's folder says."""
        facts = read_model_facts(self.model)
        if self.template_kwargs is None:
            return facts
        return replace(facts, template_kwargs=tuple(sorted(self.template_kwargs.items())))


def _sleep_choice(args: Sequence[str]) -> Choice:
    if given_flag(args, _SLEEP_FLAG):
        return Choice(_SLEEP_MODE, True, Origin.ARGS)
    why = "idle_s: it frees the GPU when nobody asks"
    return Choice(_SLEEP_MODE, True, Origin.SETTING, why, (f"--{_SLEEP_FLAG}",))


def command(spec: EngineSpec) -> list[str]:
    """The server's argument list. Only safetensors are loaded, and no code that comes with a model is run."""
    arguments = [sys.executable, "-m", entry_module()]
    arguments += ["--model", str(spec.model), "--served-model-name", spec.served_name, "--uds", str(spec.socket)]
    arguments += HUGGING_FACE_FORMAT
    if given(spec.settings.args, "--load-format") is None:
        arguments += ["--load-format", "safetensors"]
    if given_flag(spec.settings.args, "log-error-stack") is None:
        # The development mode switches it on, and the stack of a refused request ends with the text of the request.
        arguments.append("--no-log-error-stack")
    return [*arguments, *spec.plan.arguments, *spec.settings.args]


@cache
def entry_module() -> str:
    """The module that starts vLLM's server; an older vLLM has it elsewhere. Nothing of vLLM is imported."""
    found = find_spec("vllm")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    file = Path(*_ENTRY.split(".")[1:]).with_suffix(".py")
    return _ENTRY if any((folder / file).is_file() for folder in folders) else _OLD_ENTRY


def environment(spec: EngineSpec) -> dict[str, str]:
    """The server's environment.

    The development mode opens the endpoints that reload weights; only the private socket reaches them.
    """
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_RPC_BASE_PATH": str(spec.runtime),  # the sockets between its processes, which it leaves behind
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        QUIET_VARIABLE: "1",
        EMPTY_TOKENS_VARIABLE: "1",
    }
    # vLLM would let the first, an older way to give the size of its cache, overrule an argument. The second is ours.
    # The third opens endpoints that nobody needs where no adapters are served.
    withheld = ("VLLM_CPU_KVCACHE_SPACE", INT4_LINEAR_VARIABLE, LORA_VARIABLE, RUNTIME_VARIABLE)
    ours = inherited_environment(spec.settings.environment)
    inherited = {name: value for name, value in ours.items() if name not in withheld}
    # The phases of a start are read from its log; TRL, once imported, has every vLLM log errors alone.
    if inherited.get(_LOG_LEVEL) != "DEBUG":
        variables[_LOG_LEVEL] = "INFO"
    chosen = spec.plan.variables
    if "VLLM_PLUGINS" in inherited:
        chosen["VLLM_PLUGINS"] = _PLUGIN  # a list that a person gave would leave ours out
    for name in _LISTS:
        if name in chosen and inherited.get(name):
            chosen[name] = f"{inherited[name]},{chosen[name]}"
    return inherited | variables | chosen


def launch_digest(spec: EngineSpec) -> str:
    """What two engines of one folder have in common that were started alike, with whichever weights; as hex SHA-256.

    What an engine holds is told by its record, and by probes; how much memory was free at its start does not matter.
    """
    # How many share a GPU is part of how an engine was started, unless its share is given.
    shares = spec.device is Device.CUDA and spec.settings.gpu_memory_share is None
    without = {"start_timeout_s", "gptq_kernel"} if shares else {"start_timeout_s", "gptq_kernel", "replicas"}
    settings, able = spec.settings.model_dump(mode="json", exclude=without), spec.capabilities
    parts: list[Any] = [able.engine_device.value, able.vllm, spec.served_name, settings]
    # Only what the machine decides: what follows from the model is known from what the engine holds.
    if (dtype := choose_dtype(spec.settings, able, spec.facts)).origin is Origin.MACHINE:
        parts.append({dtype.name: dtype.value})
    if choose_gptq_kernel(spec.settings, able, spec.facts) is GptqKernel.TORCH:
        parts.append({"gptq_kernel": GptqKernel.TORCH.value})
    if spec.facts.template_kwargs:
        parts.append({"chat_template_kwargs": dict(spec.facts.template_kwargs)})
    if spec.lora is not None:  # then its folder is the base, which no reload changes
        parts.append({"base": str(spec.model), "lora": spec.lora.parts()})
    if spec.engine_capabilities.sleeps:  # without the flag vLLM would say that it sleeps, and free nothing
        parts.append("sleeps")
    if any(name in os.environ for name in CPU_LIMITS):  # the engine rounds as it was limited when it was started
        parts.append(able.hardware(spec.settings))
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
