"""Builds the arguments and environment for launching a vLLM server. The options are chosen in plan.py.

Other launchers can also use this module: running `command(spec)` with `environment(spec)` starts a usable engine
anywhere, provided that its HTTP API can be reached.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from svc.engine.device import CPU_LIMITS, DeviceCapabilities
from svc.engine.engine_capabilities import EngineCapabilities
from svc.engine.machine import read_machine
from svc.engine.model_facts import ModelFacts, read_model_facts
from svc.engine.vllm import plan
from svc.engine.vllm.choice import Choice, Origin
from svc.engine.vllm.environment import inherited_environment
from svc.engine.vllm.lora import RUNTIME_VARIABLE, LoraSlots, lora_choices
from svc.engine.vllm.number_type import choose_dtype, choose_gptq_kernel
from svc.engine.vllm.plugin import (
    EMPTY_TOKENS_VARIABLE,
    INT4_LINEAR_VARIABLE,
    LORA_VARIABLE,
    QUIET_VARIABLE,
    SCALES_VARIABLE,
)
from svc.engine.vllm.user_args import given, given_flag
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings.engine import Device, EngineSettings, GptqKernel

SOCKET_FILE = "engine.sock"
HUGGING_FACE_FORMAT = ["--config-format", "hf", "--tokenizer-mode", "hf"]
"""Options that make vLLM read `config.json` and `tokenizer.json`, as training does. Mistral's model folders contain the
model in two formats, and by default vLLM reads `params.json` and `tekken.json`. Since `engine.args` come later, they
can override these options."""
_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_STARTER = "svc.engine.vllm.start"
_LISTS = ("VLLM_DISABLED_KERNELS", "VLLM_PLUGINS")
"""vLLM environment variables whose values are comma-separated lists of names."""
_OUTPUT_LAYER = "lm_head"
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"
_SLEEP_FLAG, _SLEEP_MODE = "enable-sleep-mode", "enable_sleep_mode"
_PLUGIN = "tuneserve"
"""Name of this project's entry point in `vllm.general_plugins`."""


@dataclass(frozen=True)
class EngineSpec:
    """Specification of an engine to start.

    Attributes:
        model: folder with the config, the safetensors files and the tokenizer.
        served_name: the only name under which the engine serves the model.
        runtime: folder for the engine's socket, with owner-only permissions.
        state: folder for the engine's lock and record, which a later server reads.
        log: file for the engine's output.
        cache: folder for compiled kernels.
        capabilities: capabilities of this machine.
        template_kwargs: arguments for the chat template, or None to use the arguments stored in the model's folder.
        lora: capacity for adapters, or None for an engine without adapters.
        engines: number of engines that share the machine, including this one.
        idles: whether an idle time (`idle_s`) is set for the model, after which its engine may sleep.
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
        """The Unix socket on which the engine listens."""
        return self.runtime / SOCKET_FILE

    @cached_property
    def plan(self) -> plan.EnginePlan:
        """Launch options, chosen on first access based on the state of the machine at that time.

        On a machine with a GPU, this may take seconds.
        """
        machine = read_machine(gpus=self.device is Device.CUDA)
        planner = plan.EnginePlanner(self.settings, self.capabilities, machine, self.facts, self.cache, self.engines)
        lora = lora_choices(self.lora, self.settings.args) if self.lora else ()
        sleep = (_sleep_choice(self.settings.args),) if self.engine_capabilities.sleeps else ()
        return plan.EnginePlan((*planner.plan().choices, *lora, *sleep))

    @property
    def device(self) -> Device:
        """Device that the engine will run on."""
        return self.capabilities.device(self.settings)

    @cached_property
    def engine_capabilities(self) -> EngineCapabilities:
        """Capabilities that the engine will have. The first access reads the model's folder.

        On a CPU, mixtures of experts cannot be reloaded, because vLLM packs the experts on the first load but not on a
        reload. After a reload, vLLM 0.32's log-probabilities were off by 2.5 nats per token (Qwen3-MoE, Mixtral); after
        a fresh start with the same files, they were off by only 0.01.
        """
        return EngineCapabilities(
            reloads=self.device is not Device.CPU or not self.facts.experts,
            adapters=self.lora.max_loaded if self.lora else 0,
            unprobed=self._unprobed(),
            # With the flag vLLM 0.32 does not start on a CPU, and uses its own allocator for a GPU's memory.
            sleeps=self.idles
            and self.device is Device.CUDA
            and given_flag(self.settings.args, _SLEEP_FLAG) is not False,
        )

    def _unprobed(self) -> str | None:
        """Return the reason why the engine cannot be probed, or None if it can be.

        On a CPU, vLLM 0.32 cannot be probed if adapters may change the output layer. Without `--lora-target-modules`,
        adapters may change any layer.
        """
        args = self.settings.args
        if self.device is not Device.CPU or (self.lora is None and not given_flag(args, "enable-lora")):
            return None
        every_layer = self.lora is None and given(args, "--lora-target-modules") is None
        if every_layer or _OUTPUT_LAYER in args:
            return "with --enable-lora, prompt log-probabilities can crash vLLM on a CPU"
        return None

    @cached_property
    def facts(self) -> ModelFacts:
        """Properties of the model that the engine depends on, read from the model's folder."""
        facts = read_model_facts(self.model)
        if self.template_kwargs is None:
            return facts
        return replace(facts, template_kwargs=tuple(sorted(self.template_kwargs.items())))


def _sleep_choice(args: Sequence[str]) -> Choice:
    if given_flag(args, _SLEEP_FLAG):
        return Choice(_SLEEP_MODE, True, Origin.ARGS)
    reason = "idle_s: the GPU is freed while there are no requests"
    return Choice(_SLEEP_MODE, True, Origin.SETTING, reason, (f"--{_SLEEP_FLAG}",))


def command(spec: EngineSpec) -> list[str]:
    """Return the argument list for launching the server.

    Only safetensors files are loaded, and code that comes with a model is never run.
    """
    starter = [_STARTER] if spec.device is Device.CPU else []
    arguments = [sys.executable, "-m", *starter, _ENTRY]
    arguments += ["--model", str(spec.model), "--served-model-name", spec.served_name, "--uds", str(spec.socket)]
    arguments += HUGGING_FACE_FORMAT
    if given(spec.settings.args, "--load-format") is None:
        arguments += ["--load-format", "safetensors"]
    if given_flag(spec.settings.args, "log-error-stack") is None:
        # The development mode enables it, and the stack of a rejected request ends with the text of the request.
        arguments.append("--no-log-error-stack")
    return [*arguments, *spec.plan.arguments, *spec.settings.args]


def environment(spec: EngineSpec) -> dict[str, str]:
    """Return the environment variables for launching the server.

    They enable vLLM's development mode, which provides the endpoints for reloading weights. The endpoints
    can be reached only through the private socket.
    """
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_RPC_BASE_PATH": str(spec.runtime),  # sockets between its processes, which it does not remove
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        QUIET_VARIABLE: "1",
        EMPTY_TOKENS_VARIABLE: "1",
        SCALES_VARIABLE: "1",
    }
    # In vLLM the first, an older setting of the cache size, overrides an argument. The next two are ours. The last
    # enables endpoints that are not needed without adapters.
    withheld = ("VLLM_CPU_KVCACHE_SPACE", INT4_LINEAR_VARIABLE, LORA_VARIABLE, RUNTIME_VARIABLE)
    ours = inherited_environment(spec.settings.environment)
    inherited = {name: value for name, value in ours.items() if name not in withheld}
    # The phases of a start are read from its log; TRL, once imported, makes every vLLM log errors only.
    if inherited.get(_LOG_LEVEL) != "DEBUG":
        variables[_LOG_LEVEL] = "INFO"
    chosen = spec.plan.variables
    if "VLLM_PLUGINS" in inherited:
        chosen["VLLM_PLUGINS"] = _PLUGIN  # a list from the user would not contain ours
    for name in _LISTS:
        if name in chosen and inherited.get(name):
            chosen[name] = f"{inherited[name]},{chosen[name]}"
    return inherited | variables | chosen


def launch_digest(spec: EngineSpec) -> str:
    """Return a hex SHA-256 of everything that a launch depends on, except for the weights and the free memory.

    The weights are identified by the engine's record and its probes.
    """
    # The number of engines that share a GPU is part of the launch, unless the share is given.
    shares = spec.device is Device.CUDA and spec.settings.gpu_memory_share is None
    without: dict[str, Any] = dict.fromkeys(("launcher", "start_timeout_s", "gptq_kernel"), True)
    without["replicas"] = {"remove_after_s"} if shares else True
    settings, capabilities = spec.settings.model_dump(mode="json", exclude=without), spec.capabilities
    parts: list[Any] = [capabilities.engine_device.value, capabilities.vllm, spec.served_name, settings]
    # Only choices by the machine: those by the model follow from the engine's content.
    if (dtype := choose_dtype(spec.settings, capabilities, spec.facts)).origin is Origin.MACHINE:
        parts.append({dtype.name: dtype.value})
    if choose_gptq_kernel(spec.settings, capabilities, spec.facts) is GptqKernel.TORCH:
        parts.append({"gptq_kernel": GptqKernel.TORCH.value})
    if spec.facts.template_kwargs:
        parts.append({"chat_template_kwargs": dict(spec.facts.template_kwargs)})
    if spec.lora is not None:  # its folder is the base, which no reload changes
        parts.append({"base": str(spec.model), "lora": spec.lora.parts()})
    if spec.engine_capabilities.sleeps:  # without the flag vLLM would report that it sleeps, and free nothing
        parts.append("sleeps")
    if any(name in os.environ for name in CPU_LIMITS):  # limits at its start determine how the engine rounds
        parts.append(capabilities.hardware(spec.settings))
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()
