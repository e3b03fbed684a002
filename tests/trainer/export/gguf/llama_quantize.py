"""Command line of llama.cpp's `llama-quantize` on the shared library in npm's prebuilt package, which lacks the tool.

python llama_quantize.py FOLDER_OF_LIBRARIES SOURCE TARGET TYPE THREADS
"""

import ctypes
import sys
from pathlib import Path

FILE_TYPES = {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
"""Values of `llama_ftype` in llama.h."""


class Parameters(ctypes.Structure):
    """The first two fields of `llama_model_quantize_params`, with room for all others."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("others", ctypes.c_char * 504))


def main(folder: Path, source: str, target: str, type: str, threads: str) -> int:
    """Quantize a file and return the exit code."""
    for pattern in ("libggml-base*.so", "libggml.v*.so"):
        ggml = ctypes.CDLL(str(next(folder.glob(pattern))), ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama = ctypes.CDLL(str(next(folder.glob("libllama.v*.so"))))
    llama.llama_model_quantize_default_params.restype = Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = int(threads), FILE_TYPES[type]
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
