"""Chooses the options for launching an engine on this machine, and records where each value comes from.

The user's choices come first: `engine.args`, then settings. The other options are derived from the
machine and the model, or left to vLLM where its defaults are good. This module starts no processes and
reads no files; it only makes decisions based on its inputs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.engine.machine import Machine
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.choice import AUTO, Choice, Origin, Value, as_argument, as_given, as_number
from svc.engine.vllm.number_type import FOUR_BITS, choose_dtype, explain_gptq_kernel, is_wide, weight_bytes
from svc.engine.vllm.user_args import given, given_flag
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings

GIB = 2**30
_BLOCK_SIZE = 32
_MEMORY_SHARE = 2
"""Divisor of the memory that is left after loading the weights: half of that memory is for the KV cache, and the rest
is for long prompts."""
_UNKNOWN_KV_CACHE = 4 * GIB
_GPU_SHARE = 0.9
"""Fraction of a GPU's memory that an engine may use. vLLM's default is 0.92, but an in-place reload needs some
memory beyond what vLLM measured when it started."""
_GPU_MARGIN = GIB // 2
"""Approximate size of vLLM's CUDA context, which vLLM creates before it compares its memory share with the free
memory."""
_MIN_GPU_SHARE = 0.01
_SHARE_OPTIONS = ("--gpu-memory-utilization", "--device-memory-utilization")
_ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""vLLM's executor class that runs the model in the scheduler's process. With the short name `uni`, vLLM would use `mp`
on a CPU: a separate process, in which vLLM determines how OpenMP binds its threads."""
_OTHER_PARALLELISM = (("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """All options chosen for launching an engine."""

    choices: tuple[Choice, ...]

    def __getitem__(self, name: str) -> Choice:
        return next(choice for choice in self.choices if choice.name == name)

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments for vLLM, collected from all options."""
        return [argument for choice in self.choices for argument in choice.arguments]

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for vLLM, collected from all options."""
        return dict(pair for choice in self.choices for pair in choice.variables)

    def rows(self) -> list[dict[str, Value]]:
        """Return all options as JSON objects for display."""
        return [
            {"name": choice.name, "value": choice.value, "origin": choice.origin.value, "reason": choice.reason}
            for choice in self.choices
        ]


@dataclass(frozen=True)
class EnginePlanner:
    """Chooses all options for launching an engine.

    Args:
        capabilities: capabilities of the machine that the engine will run on.
        machine: the machine's current resources.
        cache: folder for compiled kernels.
        engines: number of engines that share the machine, including this one.
    """

    _settings: EngineSettings
    _capabilities: DeviceCapabilities
    _machine: Machine
    _model: ModelFacts
    _cache: Path
    _engines: int

    @property
    def _args(self) -> Sequence[str]:
        return self._settings.args

    @property
    def _device(self) -> Device:
        return self._capabilities.device(self._settings)

    @property
    def _cpu(self) -> bool:
        return self._device is Device.CPU

    def plan(self) -> EnginePlan:
        """Choose all options for the launch.

        Raises:
            EngineError: the model's format cannot be served on this device, or `engine.cores` exceeds the number
                of available cores.
        """
        length, concurrency, parallel = self._max_model_len(), self._max_num_seqs(), self._tensor_parallel()
        block, ranks = self._block_size(), _integer(parallel.value) or 1
        dtype = choose_dtype(self._settings, self._capabilities, self._model)
        four_bits = self._model.quantization in FOUR_BITS
        kernel = explain_gptq_kernel(self._settings, self._capabilities) if four_bits else None
        if self._cpu:
            executor = self._executor(ranks)
            threads = self._threads(ranks, bindable=executor.value != _ONE_PROCESS)
            own = [executor, threads, self._kv_cache(length, concurrency, block, ranks, wide=is_wide(dtype))]
        else:
            own = [self._gpu_share(ranks)]
        choices = [
            *(self._which_device(), length, concurrency, dtype, kernel, self._eager(), block, *own, parallel),
            *(self._left_to_vllm("enable-prefix-caching"), self._left_to_vllm("enable-chunked-prefill")),
            *(self._content_format(), self._template_kwargs(), self._compile_cache()),
        ]
        return EnginePlan(tuple(choice for choice in choices if choice))

    def _which_device(self) -> Choice:
        if self._settings.device is Device.AUTO:
            return Choice(
                "device", self._device.value, Origin.MACHINE, "the device for which the installed vLLM is built"
            )
        return Choice("device", self._device.value, Origin.SETTING)

    def _max_model_len(self) -> Choice:
        name, own = "max_model_len", self._model.context
        if choice := as_given(name, self._args):
            return choice
        if own is not None and own < self._settings.max_model_len:
            # vLLM refuses to start with more.
            return as_argument(name, own, Origin.MODEL, f"the model's context length, {own:,} tokens")
        return as_argument(name, self._settings.max_model_len, self._origin(name), "tokens")

    def _max_num_seqs(self) -> Choice:
        name, origin = "max_num_seqs", self._origin("max_concurrency")
        return as_given(name, self._args) or as_argument(
            name, self._settings.max_concurrency, origin, "sequences decoded concurrently"
        )

    def _eager(self) -> Choice:
        name, eager = "enforce_eager", is_eager(self._settings, self._device)
        # "Eager" leaves vLLM's log-probability kernel compiled: 15 s at the first probe after every start.
        variables = (("TORCHDYNAMO_DISABLE", "1"),) if eager else ()
        if given_flag(self._args, "enforce-eager") is not None:
            return Choice(name, eager, Origin.ARGS, variables=variables)
        arguments = ("--enforce-eager",) if eager else ()
        reason = "on a CPU, compiling takes a minute to gain a quarter more speed" if self._cpu else "faster on a GPU"
        return Choice(name, eager, Origin.MACHINE, reason, arguments, variables)

    def _block_size(self) -> Choice:
        name = "block_size"
        if choice := as_given(name, self._args):
            return choice
        if not self._cpu:
            return Choice(name, AUTO, Origin.VLLM, "depends on the GPU's attention kernel")
        # The prefix cache stores whole blocks: with vLLM's 128 tokens most of a short prompt is computed again.
        return as_argument(
            name,
            _BLOCK_SIZE,
            Origin.DEFAULT,
            "tokens; small blocks, so that short prompts also benefit from the prefix cache",
        )

    def _executor(self, ranks: int) -> Choice:
        name, machine = "distributed_executor_backend", self._machine
        if choice := as_given(name, self._args):
            return choice
        if ranks > 1 or any(given(self._args, *options) is not None for options in _OTHER_PARALLELISM):
            return Choice(name, AUTO, Origin.VLLM, "one process per rank")
        if machine.threads_bind is not None or machine.nodes > 1:
            return Choice(name, AUTO, Origin.VLLM, "binds threads to cores")
        # Saves one import of torch and vLLM, 8 of 32 s; decoding is a tenth faster, with 0.7 GiB less memory.
        return as_argument(name, _ONE_PROCESS, Origin.MACHINE, "the machine has one NUMA node")

    def _threads(self, ranks: int, *, bindable: bool) -> Choice:
        name, variable = "threads", "VLLM_CPU_OMP_THREADS_BIND"
        cores, bound = self._machine.cores, self._machine.threads_bind
        if bound is not None:
            return Choice(name, bound, Origin.ENVIRONMENT, variable, variables=((variable, bound),))
        if ranks > 1:
            return Choice(name, AUTO, Origin.VLLM, "the cores of one NUMA node per rank")
        (most, reason), count, origin = self._most_cores(), self._settings.cores, Origin.SETTING
        if count is None:
            # If threads of two engines compete for one core, both engines slow down to a quarter.
            count, origin = max(1, most // self._engines), Origin.MACHINE
            reason += f"; {self._engines} engines share them" if self._engines > 1 else ""
        elif count > most:
            raise EngineError(f"engine.cores is {count}", expected=f"at most {most} ({reason})")
        if count == len(cores) and bindable:
            numbers = ",".join(str(core) for core in cores)
            return Choice(name, count, origin, reason, variables=((variable, numbers),))
        # Bound to numbered cores, all engines of a machine, or containers of a host, would share the first ones.
        free = ((variable, "nobind"), ("OMP_NUM_THREADS", str(count)))
        return Choice(name, count, origin, reason, variables=free)

    def _most_cores(self) -> tuple[int, str]:
        """Return the number of cores that this process may use, and a phrase that says what limits it."""
        cores, quota = len(self._machine.cores), self._machine.quota
        if quota is not None and quota < cores:
            return max(1, int(quota)), f"a quota of {quota:g} cores"
        # vLLM's own choice leaves a core unused; with all cores, decoding is 1.5 times as fast.
        return cores, f"{_counted(cores, 'core')} of this process"

    def _kv_cache(self, length: Choice, concurrency: Choice, block: Choice, ranks: int, *, wide: bool) -> Choice:
        name, setting = "kv_cache_memory_bytes", self._settings.kv_cache_gib
        if choice := as_given(name, self._args):
            return choice
        if given(self._args, *_SHARE_OPTIONS) is not None:
            return Choice(name, AUTO, Origin.ARGS, f"the rest of the memory allowed by {_SHARE_OPTIONS[0]}")
        if setting is not None:
            return as_argument(name, int(setting * GIB), Origin.SETTING, _gib(setting * GIB))
        free = max(0, self._machine.free - weight_bytes(self._model, wide=wide))
        sequence = self._sequence_bytes(length, block, wide=wide)
        # One sequence must fit, or vLLM does not start; but never more than the machine has.
        minimum = min(sequence or GIB, self._machine.memory // _MEMORY_SHARE)
        available = max(free // _MEMORY_SHARE, minimum)
        total, origin, reason = _UNKNOWN_KV_CACHE, Origin.DEFAULT, "the cache size per token is unknown"
        if sequence is not None and (count := _integer(concurrency.value)) is not None:
            total, origin = sequence * (count + 1), Origin.MODEL  # one more, because vLLM reserves a block
            reason = f"enough for {count} sequences of {length.value} tokens"
        if total > available:
            total, origin, reason = available, Origin.MACHINE, f"half of the {_gib(free)} left free by the weights"
            if available == minimum:
                reason = f"memory for only one sequence; the weights leave only {_gib(free)} free"
        size = max(1, total // ranks)
        return as_argument(name, size, origin, f"{_gib(size)}: {reason}")

    def _sequence_bytes(self, length: Choice, block: Choice, *, wide: bool) -> int | None:
        """Return the size of the KV cache for a sequence of maximum length, in bytes, or None if it is unknown.

        The size is rounded up to whole blocks.
        """
        tokens, block_size = _integer(length.value) or self._model.context, _integer(block.value) or _BLOCK_SIZE
        if tokens is None or self._model.token_bytes is None:
            return None
        return -(-tokens // block_size) * block_size * self._model.token_bytes * (1 + wide)

    def _gpu_share(self, ranks: int) -> Choice:
        name, setting, gpus = "gpu_memory_utilization", self._settings.gpu_memory_share, self._machine.gpus[:ranks]
        if choice := as_given(name, self._args, *_SHARE_OPTIONS):
            return choice
        if setting is not None:
            return as_argument(name, setting, Origin.SETTING)
        if not gpus:
            return Choice(name, AUTO, Origin.VLLM, "nvidia-smi shows no GPU")
        fullest, engines = min(gpus, key=lambda gpu: gpu.free / gpu.memory), self._engines
        free = int(100 * (fullest.free - _GPU_MARGIN) / fullest.memory) / 100
        share = max(_MIN_GPU_SHARE, min(int(100 * _GPU_SHARE / engines) / 100, free))
        reason = f"{_gib(fullest.free)} of {_gib(fullest.memory)} is free"
        if engines > 1:
            reason += f"; {engines} engines share it"
        return as_argument(name, share, Origin.MACHINE, reason)

    def _tensor_parallel(self) -> Choice:
        name, setting, model = "tensor_parallel_size", self._settings.tensor_parallel, self._model
        if choice := as_given(name, self._args, "-tp"):
            return choice
        if setting is not None:
            return as_argument(name, setting, Origin.SETTING)
        if self._cpu:
            return Choice(name, 1, Origin.VLLM)
        gpus = len(self._machine.gpus)
        taken = prod(_integer(given(self._args, *options)) or 1 for options in _OTHER_PARALLELISM)
        ranks = next((count for count in range(gpus // taken, 1, -1) if model.divides(count)), 1)
        seen = f"{_counted(gpus, 'GPU')} visible"
        if ranks == 1:
            return Choice(name, 1, Origin.MACHINE if gpus < 2 else Origin.MODEL, seen)
        reason = f"{seen}; {model.heads} attention heads and {model.kv_heads} key-value heads"
        return as_argument(name, ranks, Origin.MACHINE, reason)

    def _left_to_vllm(self, flag: str) -> Choice:
        name, value = flag.replace("-", "_"), given_flag(self._args, flag)
        if value is not None:
            return Choice(name, value, Origin.ARGS)
        return Choice(name, AUTO, Origin.VLLM, "enabled for every model that supports it")

    def _content_format(self) -> Choice:
        name = "chat_template_content_format"
        # By default vLLM passes texts as lists of parts to templates that accept them, which may not trim those.
        return as_given(name, self._args) or as_argument(name, "string", Origin.DEFAULT, "as in training")

    def _template_kwargs(self) -> Choice | None:
        name, values = "default_chat_template_kwargs", dict(self._model.template_kwargs)
        if choice := as_given(name, self._args):
            return choice
        return as_argument(name, json.dumps(values), Origin.MODEL, "as in training") if values else None

    def _compile_cache(self) -> Choice:
        path = str(self._cache)
        return Choice("compile_cache", path, Origin.DEFAULT, "under $SVC_HOME", variables=(("VLLM_CACHE_ROOT", path),))

    def _origin(self, setting: str) -> Origin:
        return Origin.SETTING if setting in self._settings.model_fields_set else Origin.DEFAULT


def is_eager(settings: EngineSettings, device: Device) -> bool:
    """Return whether compilation is skipped. By default it is skipped on a CPU, but `engine.args` take precedence."""
    flag = given_flag(settings.args, "enforce-eager")
    return device is Device.CPU if flag is None else flag


def _integer(value: Value | None) -> int | None:
    number = as_number(value) if isinstance(value, str) else value
    return number if isinstance(number, int) and number > 0 else None


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
