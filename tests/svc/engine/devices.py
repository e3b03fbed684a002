"""Devices of each kind, as torch and vLLM report them."""

from svc.engine.device import DeviceCapabilities, TorchGpu
from svc.settings.engine import Device

AVX512 = DeviceCapabilities(
    instruction_set="x86_64-avx512_bf16",
    cpu_bfloat16=True,
    gpu=None,
    vllm="0.32.0",
    engine_device=Device.CPU,
    vllm_gptq=True,
    vllm_int8=True,
    vllm_fp8=False,
)
AMX = AVX512.model_copy(update={"instruction_set": "x86_64-amx_bf16"})
AVX512_ALONE = AVX512.model_copy(update={"instruction_set": "x86_64-avx512f", "cpu_bfloat16": False})
AVX2 = AVX512.model_copy(update={"instruction_set": "x86_64-avx2", "cpu_bfloat16": False, "vllm_gptq": False})
HOPPER = AVX512.model_copy(
    update={
        "engine_device": Device.CUDA,
        "vllm_fp8": True,
        "gpu": TorchGpu(name="NVIDIA H100 80GB HBM3", compute_capability=(9, 0), bfloat16=True),
    }
)
TURING = HOPPER.model_copy(update={"gpu": TorchGpu(name="Tesla T4", compute_capability=(7, 5), bfloat16=False)})
