"""Prints which data types are used on this machine to train and to serve each format, and why."""

from collections.abc import Sequence

from svc.engine.device import DeviceCapabilities, NumberType
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.number_type import AWQ, COMPRESSED_TENSORS, GPTQ, choose_dtype, explain_gptq_kernel
from svc.settings.engine import EngineSettings
from svc.terminal import console
from svc.version import Format

_METHODS = {Format.GPTQ: GPTQ, Format.AWQ: AWQ, Format.INT8: COMPRESSED_TENSORS, Format.FP8: COMPRESSED_TENSORS}
"""Quantization method named in the config of each quantized format."""


def say_number_types(able: DeviceCapabilities, engine: EngineSettings, formats: Sequence[Format]) -> None:
    """Print the data type chosen for training, and the one for serving each format on this machine, with reasons.

    Args:
        able: capabilities of this machine.
        formats: the recipe's formats.

    Raises:
        EngineError: a quantized format cannot be served on this machine.
    """
    served = able.device(engine)
    _say("train", f"{able.training_type} on {able.training_device}", able.training_reason)
    for format in formats:
        if format is Format.ADAPTER:
            continue
        quantization = _METHODS.get(format)
        dtype = choose_dtype(engine, able, ModelFacts(dtype=NumberType.BFLOAT16, quantization=quantization))
        if format in (Format.GPTQ, Format.AWQ):
            kernel = explain_gptq_kernel(engine, able)
            _say(format, f"{dtype.value} on {served}, {kernel.value} kernel", kernel.reason)
            continue
        _say(format, f"{dtype.value} on {served}", dtype.reason)
        if format in (Format.INT8, Format.FP8) and (warning := able.check_eight_bits(format, engine)):
            console.print(f"[yellow]  {warning}[/yellow]", soft_wrap=True)


def _say(use: str, choice: str, reason: str) -> None:
    console.print(f"  {use}: {choice}" + (f" ({reason})" if reason else ""))
