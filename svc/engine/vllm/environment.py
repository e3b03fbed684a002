"""Selects the environment variables that an engine inherits: those its libraries use, but no secrets.

An engine runs native code from many libraries and writes a log. It must not see the server's other
variables, such as cloud credentials or a Hub token.
"""

import os
import re
from collections.abc import Iterable

_INHERITED = re.compile(
    "CC|CXX|HOME|LANG|LANGUAGE|LD_LIBRARY_PATH|LD_PRELOAD|LOGNAME|PATH|SHELL|TEMP|TERM|TMP|TMPDIR|TZ|USER|VIRTUAL_ENV"
    "|PYTHON.*"
    "|(ATEN|CPATH|CUDA|CUDNN|DNNL|FLASHINFER|GLOO|GOMP|HF|HIP|HSA|INDUCTOR|KMP|LC|LIBRARY|MALLOC|MKL|NCCL|NUMBA|NVIDIA"
    "|OMP|ONEDNN|OPENBLAS|PYTORCH|RAY|ROCM|ROCR|SAFETENSORS|TOKENIZERS|TORCH|TORCHDYNAMO|TORCHINDUCTOR|TRANSFORMERS"
    "|TRITON|VLLM|XDG)(_.*)?",
    re.DOTALL,
)
"""Matches the names of environment variables that Python, the C library, PyTorch, vLLM and their dependencies read.
Most are recognized by the part of the name before the first underscore."""
_SECRET_WORDS = frozenset({"CREDENTIALS", "KEY", "PASSWORD", "SECRET", "TOKEN"})


def inherited_environment(also: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment variables that an engine inherits.

    Args:
        also: names of additional variables to inherit, from `engine.environment`.
    """
    named = frozenset(also)
    return {name: value for name, value in os.environ.items() if name in named or _is_inherited(name)}


def _is_inherited(name: str) -> bool:
    return bool(_INHERITED.fullmatch(name)) and not _SECRET_WORDS.intersection(name.split("_"))
