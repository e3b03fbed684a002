"""Writes a merged model to a GGUF file in 4 to 6 bits. This uses llama.cpp's `llama-quantize`, because the `gguf`
package cannot write these types.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from svc.errors import NotFoundError, TrainingError
from svc.files.disk import write_whole
from svc.terminal import waiting
from trainer.export.gguf.writer import MODELFILE, GgufSummary, GgufType, compare_gguf, export_gguf

if TYPE_CHECKING:
    from svc.dataset.schema.example import ChatExample

TOOL = "llama-quantize"
_TIMEOUT_S = 3600.0


class KQuant(StrEnum):
    """llama.cpp's names for data types with blocks of 256 weights. In Q4_K_M and Q5_K_M, some tensors have 6 bits per
    weight.
    """

    Q4_K_M = "q4_k_m"
    Q5_K_M = "q5_k_m"
    Q6_K = "q6_k"


MAX_CHANGE = {KQuant.Q4_K_M: 0.2, KQuant.Q5_K_M: 0.1, KQuant.Q6_K: 0.05}
"""Maximum relative change of a matrix by quantization: the norm of the change divided by the norm of the matrix.
Measured for SmolLM2's worst matrix, in the order of the keys: 0.052, 0.053 and 0.018. SmolLM2's width of 576 is not a
multiple of 256, and llama.cpp stores such matrices in types with smaller blocks."""


def find_tool() -> str:
    """Return the path of llama.cpp's `llama-quantize`.

    Raises:
        NotFoundError: the tool is not installed.
    """
    if tool := shutil.which(TOOL):
        return tool
    raise NotFoundError(
        f"{TOOL} is not on PATH",
        expected=f"llama.cpp's quantization tool, which writes {', '.join(KQuant)}",
        todo="install llama.cpp (`brew install llama.cpp`, or a release of github.com/ggml-org/llama.cpp), "
        "or use --type q8_0",
    )


def export_k_quant(
    model: Path, out: Path, name: str, examples: "Sequence[ChatExample]", type: KQuant, *, modelfile: bool = True
) -> GgufSummary:
    """Write a merged model as `export_gguf` does, with the same checks, but in a type that needs `llama-quantize`.

    `export_gguf` writes the F16 file that `llama-quantize` reads. The quantized file is compared with the model.

    Raises:
        NotFoundError: the tool is not installed.
        TrainingError: the tool failed, or `export_gguf` rejected the model.
    """
    tool, file = find_tool(), out / f"{name}-{type}.gguf"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".f16-", dir=out) as work:
        made = export_gguf(model, Path(work), name, examples, type=GgufType.F16, modelfile=modelfile)
        written = Path(work, "quantized.gguf")
        with waiting(f"Writing {file.name} with {TOOL}"):
            _run(tool, made.file, written, type)
        change, tensor = compare_gguf(written, model, file.name, MAX_CHANGE[type])
        if modelfile:
            text = Path(work, MODELFILE).read_text("utf-8").replace(made.file.name, file.name, 1)
            write_whole(out / MODELFILE, text.encode("utf-8"))
        written.replace(file)
    return GgufSummary(file, file.stat().st_size, made.pre, made.compared, change, tensor)


def _run(tool: str, source: Path, target: Path, type: KQuant) -> None:
    """Run llama.cpp's `llama-quantize`.

    Raises:
        TrainingError: the tool failed, did not exit in time, or wrote no file.
    """
    command = [tool, str(source), str(target), type.upper(), str(len(os.sched_getaffinity(0)))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise TrainingError(f"{tool} failed: {error}", todo=f"use --type q8_0, which does not need {TOOL}") from error
    if done.returncode or not target.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise TrainingError(
            f"{tool} exited with code {done.returncode}: {lines[-1] if lines else 'no output'}",
            expected=f"a release of llama.cpp that supports the model's architecture and the type {type}",
            todo=f"use --type q8_0, which does not need {TOOL}",
        )
