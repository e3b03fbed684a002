"""Quantizes a model with gptqmodel and computes transformers' results for the dequantized weights.

    python -m tests.e2e.gptq_reference BASE OUT GROUP_SIZE

This runs in a separate process for two reasons: gptqmodel reads its thread pool size from a variable
when it is imported, which PEFT may have done long before, and it leaves temporary folders behind. The
quantized model is written to OUT, with the log-probabilities in float32 and in bfloat16 next to it.
"""

import json
import os
import random
import sys
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING

from svc.dataset.readers.reader import read_examples
from tests.e2e.conftest import DATA

if TYPE_CHECKING:
    import torch

Logprobs = list[list[float]]
START = 20
RESULT = "reference.json"
_SEQUENCES, _LENGTH = 8, 60


def quantize(base: Path, out: Path, group_size: int) -> Path:
    """Quantize with gptqmodel directly, because recipes do not support whole-channel groups (-1)."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default is too small for two cores
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    examples = [example.question for example in read_examples(DATA / "train.jsonl")[:8]]
    config = QuantizeConfig(bits=4, group_size=group_size, desc_act=False, act_group_aware=group_size > 0)
    model = GPTQModel.load(str(base), config)
    out.mkdir()
    with chdir(out):  # gptqmodel leaves a folder of logs in the working folder
        model.quantize(examples, batch_size=4, calibration_data_min_length=1)
        model.save(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def sequences() -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(10, 40_000) for _ in range(_LENGTH)] for _ in range(_SEQUENCES)]


def dequantized(quantized: Path) -> dict[str, "torch.Tensor"]:
    """Return the weights of every quantized layer in float32 with shape [out, in], keyed by name."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(str(quantized), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TorchLinear)}
    with torch.no_grad():
        # The class's function: that of a layer is compiled, which would need a compiler.
        return {name: TorchLinear.dequantize_weight(layer).T.float() for name, layer in layers.items()}


def logprobs_of(base: Path, weights: dict[str, "torch.Tensor"], dtype: "torch.dtype") -> Logprobs:
    """Return transformers' log-probabilities for the base with the given weights in its layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    logprobs = []
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        for ids in sequences():
            scores = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
            logprobs.append([float(scores[place - 1, ids[place]]) for place in range(START, _LENGTH)])
    return logprobs


def main(base: Path, out: Path, group_size: int) -> None:
    """Quantize the model and write the results for its dequantized weights."""
    import torch

    quantize(base, out, group_size)
    weights = dequantized(out)
    logprobs = {str(dtype): logprobs_of(base, weights, dtype) for dtype in (torch.float32, torch.bfloat16)}
    (out / RESULT).write_text(json.dumps(logprobs), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
