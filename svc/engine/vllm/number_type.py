"""In which numbers an engine computes, whose kernel multiplies by 4-bit weights, and what weights take so."""

from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.choice import AUTO, Choice, Origin, as_argument, as_given
from svc.engine.vllm.plugin import INT4_LINEAR_VARIABLE
from svc.errors import EngineError
from svc.settings import Device, EngineSettings, GptqKernel

GPTQ = "gptq"
"""What the config of a model in 4 bits names as its quantization."""
_WIDE = (NumberType.FLOAT32.value, "float")
"""vLLM's names for numbers of 32 bits."""
_VLLM_KERNELS = "CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"
"""vLLM's own kernels for 4-bit weights on a CPU. The first says yes also where its operator is missing, the second
where the package zentorch is installed; both are asked before a plugin's."""


def choose_dtype(settings: EngineSettings, capabilities: DeviceCapabilities, model: ModelFacts) -> Choice:
    """In which numbers an engine computes: as the model is stored, unless the device is slow in them.

    Raises:
        EngineError: the model is in GPTQ, which cannot be served there.
    """
    name, own, kernel = "dtype", model.dtype, choose_gptq_kernel(settings, capabilities, model)
    cpu = capabilities.device(settings) is Device.CPU
    if choice := as_given(name, settings.args):
        _check_gptq_dtype(str(choice.value), kernel, own)
        return choice
    if kernel is GptqKernel.TORCH:
        return as_argument(name, NumberType.BFLOAT16.value, Origin.MACHINE, "what PyTorch's 4-bit kernel takes")
    if cpu and not capabilities.cpu_bfloat16 and model.quantization is None:
        reason = f"{capabilities.instruction_set} has no fast numbers of 16 bits"
        return as_argument(name, NumberType.FLOAT32.value, Origin.MACHINE, reason)
    if own is None or own == NumberType.FLOAT32:
        return Choice(name, AUTO, Origin.VLLM, "16 bits")
    if cpu:
        return Choice(name, own, Origin.MODEL, "as it is stored")
    return Choice(name, own, Origin.MODEL, "as it is stored; vLLM takes float16 on a GPU that has no bfloat16")


def _check_gptq_dtype(value: str, kernel: GptqKernel | None, own: str | None) -> None:
    """Refuses a number type in which the kernel does not multiply.

    Args:
        value: what `engine.args` say.
        own: in which the model is stored; what vLLM takes for `auto`.

    Raises:
        EngineError: vLLM would not start with it.
    """
    taken = {GptqKernel.VLLM: ("bfloat16", "float16", "half", AUTO), GptqKernel.TORCH: ("bfloat16", AUTO)}
    if kernel is None or ((own if value == AUTO else value) or AUTO) in taken[kernel]:
        return
    raise EngineError(
        f"--dtype {value} in engine.args, and a model in GPTQ",
        expected=f"{' or '.join(taken[kernel])}: what the kernel of {kernel} takes",
        todo="leave --dtype out of engine.args: where float32 is faster, merged versions get it by themselves",
    )


def choose_gptq_kernel(
    settings: EngineSettings, capabilities: DeviceCapabilities, model: ModelFacts
) -> GptqKernel | None:
    """Whose kernel multiplies by 4-bit weights; None for a model that has none.

    Raises:
        EngineError: there is no kernel for it.
    """
    return capabilities.gptq_kernel(settings) if model.quantization == GPTQ else None


def explain_gptq_kernel(settings: EngineSettings, capabilities: DeviceCapabilities) -> Choice:
    """Whose kernel multiplies by 4-bit weights, and why.

    Raises:
        EngineError: there is no kernel for it.
    """
    name, kernel = "gptq_kernel", capabilities.gptq_kernel(settings)
    asked = settings.gptq_kernel is not GptqKernel.AUTO
    origin = Origin.SETTING if asked else Origin.MACHINE
    if kernel is GptqKernel.VLLM:
        return Choice(name, kernel.value, origin, "" if asked else "vLLM's own")
    reason = "" if asked else f"vLLM has none for {capabilities.hardware(settings)}"
    variables = ((INT4_LINEAR_VARIABLE, "1"), ("VLLM_DISABLED_KERNELS", _VLLM_KERNELS))
    return Choice(name, kernel.value, origin, reason, variables=variables)


def is_wide(dtype: Choice) -> bool:
    """Whether an engine computes in 32 bits."""
    return dtype.value in _WIDE


def weight_bytes(model: ModelFacts, *, wide: bool) -> int:
    """What a model's weights take in memory, bytes: in 32 bits twice what they take on disk in 16.

    Args:
        wide: the engine computes in 32 bits.
    """
    return model.weights * 2 if wide and model.dtype != NumberType.FLOAT32 else model.weights
