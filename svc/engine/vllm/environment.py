"""Which variables of our environment an engine inherits: those of its libraries, and no secrets.

An engine has native code of many libraries in it, and writes a log. Whatever else stands in a server's environment, as
cloud credentials or a token of the hub, is not its business.
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
"""Variables of Python, the C library, PyTorch, vLLM and what they are built on: most by the word before the first
underscore."""
_SECRET_WORDS = frozenset({"CREDENTIALS", "KEY", "PASSWORD", "SECRET", "TOKEN"})


def inherited_environment(also: Iterable[str] = ()) -> dict[str, str]:
    """The variables that an engine gets of ours.

    Args:
        also: names of further ones, as `engine.environment` gives them.
    """
    named = frozenset(also)
    return {name: value for name, value in os.environ.items() if name in named or _is_inherited(name)}


def _is_inherited(name: str) -> bool:
    return bool(_INHERITED.fullmatch(name)) and not _SECRET_WORDS.intersection(name.split("_"))
