"""The plugin that vLLM finds by its entry point `vllm.general_plugins`, in each of its processes.

Does nothing in a vLLM that this project did not start: only `svc.engine.vllm.launch` sets the variable that it looks
for.
"""

import os

INT4_LINEAR_VARIABLE = "TUNESERVE_INT4_LINEAR"
"""Set to 1 in the environment of an engine that is to use our 4-bit kernel."""


def register() -> None:
    """Adds the 4-bit linear kernel to those that vLLM may choose on a CPU. vLLM may call it more than once."""
    if os.environ.get(INT4_LINEAR_VARIABLE) != "1":
        return
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms import PlatformEnum

    from svc.engine.vllm.int4_linear import Int4LinearKernel

    register_linear_kernel(Int4LinearKernel, PlatformEnum.CPU, "mp")
