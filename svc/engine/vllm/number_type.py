"""Chooses an engine's data type and its kernel for 4-bit weights, and computes the resulting weight memory."""

from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.choice import AUTO, Choice, Origin, as_argument, as_given
from svc.engine.vllm.plugin import INT4_LINEAR_VARIABLE
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings, GptqKernel

GPTQ, AWQ = "gptq", "awq"
"""Quantization methods named in the config of a 4-bit model."""
FOUR_BITS = (GPTQ, AWQ)
COMPRESSED_TENSORS = "compressed-tensors"
"""Quantization method named in the config of an INT8 or FP8 model."""
_WIDE = (NumberType.FLOAT32.value, "float")
"""vLLM's names for the float32 data type."""
_VLLM_KERNELS = "CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"
"""vLLM's own CPU kernels for 4-bit weights, which are tried before a plugin's kernel. The first kernel claims to be
supported even if its operator is missing, and the second does so if the package zentorch is installed."""


def choose_dtype(settings: EngineSettings, capabilities: DeviceCapabilities, model: ModelFacts) -> Choice:
    """Choose an engine's data type: the type of the stored weights, unless that type is slow on the device.

    Raises:
        EngineError: the model has 4-bit weights, which cannot be served on this device.
    """
    name, own, kernel = "dtype", model.dtype, choose_gptq_kernel(settings, capabilities, model)
    cpu = capabilities.device(settings) is Device.CPU
    if choice := as_given(name, settings.args):
        _check_gptq_dtype(str(choice.value), kernel, own)
        return choice
    if kernel is GptqKernel.TORCH:
        return as_argument(name, NumberType.BFLOAT16.value, Origin.MACHINE, "required by PyTorch's 4-bit kernel")
    if cpu and not capabilities.cpu_bfloat16 and model.quantization is None:
        reason = f"{capabilities.instruction_set} has no fast 16-bit arithmetic"
        return as_argument(name, NumberType.FLOAT32.value, Origin.MACHINE, reason)
    if own is None or own == NumberType.FLOAT32:
        return Choice(name, AUTO, Origin.VLLM, "16 bits")
    if cpu:
        return Choice(name, own, Origin.MODEL, "as stored")
    return Choice(name, own, Origin.MODEL, "as stored; vLLM uses float16 on a GPU without bfloat16")


def _check_gptq_dtype(value: str, kernel: GptqKernel | None, own: str | None) -> None:
    """Check that the 4-bit kernel supports a data type.

    Args:
        value: data type from `engine.args`.
        own: data type that the model is stored in. vLLM uses it for `auto`.

    Raises:
        EngineError: vLLM would not start with this data type.
    """
    supported = {GptqKernel.VLLM: ("bfloat16", "float16", "half", AUTO), GptqKernel.TORCH: ("bfloat16", AUTO)}
    if kernel is None or ((own if value == AUTO else value) or AUTO) in supported[kernel]:
        return
    raise EngineError(
        f"engine.args contains --dtype {value}, which 4-bit models do not support",
        expected=f"{' or '.join(supported[kernel])} with the {kernel} kernel",
        todo="remove --dtype from engine.args: merged versions get float32 automatically where it is faster",
    )


def choose_gptq_kernel(
    settings: EngineSettings, capabilities: DeviceCapabilities, model: ModelFacts
) -> GptqKernel | None:
    """Return the kernel for 4-bit weights, or None if the model does not have such weights.

    Raises:
        EngineError: no kernel is available for the model.
    """
    if model.quantization not in FOUR_BITS:
        return None
    if model.quantization == AWQ:
        capabilities.check_awq(settings)
    return capabilities.gptq_kernel(settings)


def explain_gptq_kernel(settings: EngineSettings, capabilities: DeviceCapabilities) -> Choice:
    """Choose the kernel for 4-bit weights, and give the reason for the choice.

    Raises:
        EngineError: no kernel is available for the model.
    """
    name, kernel = "gptq_kernel", capabilities.gptq_kernel(settings)
    asked = settings.gptq_kernel is not GptqKernel.AUTO
    origin = Origin.SETTING if asked else Origin.MACHINE
    if kernel is GptqKernel.VLLM:
        return Choice(name, kernel.value, origin, "" if asked else "vLLM's own")
    why = "faster than vLLM's on" if capabilities.vllm_gptq else "vLLM has none for"
    reason = "" if asked else f"{why} {capabilities.hardware(settings)}"
    variables = ((INT4_LINEAR_VARIABLE, "1"), ("VLLM_DISABLED_KERNELS", _VLLM_KERNELS))
    return Choice(name, kernel.value, origin, reason, variables=variables)


def is_wide(dtype: Choice) -> bool:
    """Return whether an engine with this data type computes in float32."""
    return dtype.value in _WIDE


def weight_bytes(model: ModelFacts, *, wide: bool) -> int:
    """Return the memory that a model's weights take up in the engine, in bytes.

    In an engine that computes in float32, 16-bit weights take up twice their size on disk.

    Args:
        wide: whether the engine computes in float32.
    """
    return model.weights * 2 if wide and model.dtype != NumberType.FLOAT32 else model.weights
