"""What gptqmodel makes of a model, and what transformers gives for its dequantized weights.

    python -m tests.e2e.gptq_reference BASE OUT GROUP_SIZE

In a process of its own: gptqmodel sizes its threads by a variable that it reads when it is imported, which PEFT may
have done long before, and leaves temporary folders to the collector. Writes the quantized model to OUT, and beside it
log-probabilities in float32 and in bfloat16.
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
    """With gptqmodel directly, because no recipe asks for whole channels (-1)."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default is too small for two cores
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    examples = [example.question for example in read_examples(DATA / "train.jsonl")[:8]]
    config = QuantizeConfig(bits=4, group_size=group_size, desc_act=False, act_group_aware=group_size > 0)
    model = GPTQModel.load(str(base), config)
    out.mkdir()
    with chdir(out):  # gptqmodel leaves a folder of logs where it is called
        model.quantize(examples, batch_size=4, calibration_data_min_length=1)
        model.save(str(out))
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def sequences() -> list[list[int]]:
    chosen = random.Random(0)
    return [[chosen.randrange(10, 40_000) for _ in range(_LENGTH)] for _ in range(_SEQUENCES)]


def dequantized(quantized: Path) -> dict[str, "torch.Tensor"]:
    """Every quantized layer's weights, [out, in] in float32, by name."""
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(str(quantized), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TorchLinear)}
    with torch.no_grad():
        # The class's own function: a layer's is compiled, for which a compiler would be needed.
        return {name: TorchLinear.dequantize_weight(layer).T.float() for name, layer in layers.items()}


def logprobs_of(base: Path, weights: dict[str, "torch.Tensor"], dtype: "torch.dtype") -> Logprobs:
    """What transformers gives for the base with other weights in its layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    found = []
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
        for ids in sequences():
            scores = model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
            found.append([float(scores[place - 1, ids[place]]) for place in range(START, _LENGTH)])
    return found


def main(base: Path, out: Path, group_size: int) -> None:
    """Quantizes, and writes down what the dequantized weights give."""
    import torch

    quantize(base, out, group_size)
    weights = dequantized(out)
    found = {str(dtype): logprobs_of(base, weights, dtype) for dtype in (torch.float32, torch.bfloat16)}
    (out / RESULT).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
