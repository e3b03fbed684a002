"""Creates a version's parity report, which compares the version's files and the engine's scores with the model that was
trained.

All comparisons use the same held-out examples, with the token ids used in training. The difference between two correct
implementations with the same weights is also measured, so that the limits take this machine's rounding into account.
All thresholds are defined below, each with its source. The trained model and the reference run in transformers; the
trained model applies the adapter without merging it. Imports torch.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.registry.files import read_headers
from svc.registry.parity import Differences, ParityCheck, ParityReport
from svc.terminal import waiting
from svc.version import QUANTIZED_FORMATS, Format
from trainer.evaluation.parity import adapter as adapter_parity
from trainer.evaluation.parity import quantized as quantized_parity
from trainer.evaluation.parity.files import other_config, other_files, unreadable_weights
from trainer.evaluation.qualification import EngineReading
from trainer.evaluation.token_scores import Scores, TokenScore
from trainer.library_output import library_output_to_log
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config
from trainer.model.nf4 import round_layers_to_nf4
from trainer.model.peft_config import load_adapter
from trainer.model.product_caches import bound_product_caches
from trainer.model.release_memory import release_memory
from trainer.model.stored_weights import StoredWeights
from trainer.recipe.recipe import Recipe

BESIDE_TRAINED = "merged: compared with the trained model"
"""Name of the final parity check, which covers merging and serving together."""
BESIDE_NF4 = "adapter on the base's own weights compared with NF4, on which it was trained"
"""Name of a comparison made after QLoRA, between the adapter on the base's original weights and the adapter on the NF4
weights used in training. No limit applies, because the two inevitably differ: NF4 weights are rounded."""
_NOT_THE_SUM = 1e-3
"""Maximum share of a module's weights that may differ from base plus adapter by more than a bf16 step. This
happens for sums near 0, whose terms cancel."""
_MIN_LIMIT = 0.02
"""Minimum value of a limit on differences, in nats per token. A smaller difference between two nearly
identical models does not change any answer."""
_TIMES_FLOOR = 3.0
"""Maximum allowed difference, as a multiple of the difference that is due to rounding. Two independent rounding
differences of equal size add up to 1.4 times that size; the rest is a safety margin, because the number of tokens may
be small."""
_MAX_FLOOR = 0.1
"""Maximum rounding difference allowed, in nats per token on average. A correct bf16 engine differs from transformers by
0.01 to 0.03 nats, and a faulty engine by one nat or more."""
_WITH_LAYERS = 1.2
"""Ratio of the required memory to the size of the weights. The excess covers the adapter, and float32 copies of one
layer while its weights are compared: for an 8B model, about twelve copies of 0.23 GB each."""
_WITH_LOGITS = 2 * 2**30
"""Bytes needed for a forward pass and the float32 logits of one answer."""


def load(folder: Path, number_type: NumberType) -> PreTrainedModel:
    """Load a model from a folder onto the GPU, or onto the CPU if no GPU has enough free memory."""
    bound_product_caches()
    dtype: torch.dtype = getattr(torch, number_type)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention_implementation(load_config(folder)),
    )
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    size = sum(math.prod(tensor.shape) for tensor in read_headers(folder)) * dtype.itemsize
    return model.to(choose_device(size, free)).eval()


def choose_device(size: int, free: int | None) -> str:
    """Return the device on which to score a model: the GPU if a copy of the model fits there, or else the CPU.

    Args:
        size: size of the model's weights, in bytes.
        free: free bytes of GPU memory, or None without a GPU.
    """
    return "cuda" if free is not None and size * _WITH_LAYERS + _WITH_LOGITS <= free else "cpu"


def sum_in_float32(model: torch.nn.Module) -> None:
    """Make adapted layers add the adapter's output before rounding, as merged layers do. This matters if a
    model is in bf16.

    PEFT adds the adapter's output to the already rounded output of the base's layer. The adapter's output is often
    smaller than the rounding step and vanishes from most sums, so the result is biased toward the base: SmolLM2 with a
    second adapter on top of a merged first adapter was off by 0.020 nats per token in bf16, whereas base plus adapter
    in float32 and the merged model differ by 0.004.

    Args:
        model: a model with an unmerged adapter; its weights are not changed.
    """
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if isinstance(base, torch.nn.Linear) and base.weight.dtype is not torch.float32:
            base.__class__ = _LinearInFloat32
            layer.register_forward_hook(partial(_rounded, base.weight.dtype))


class _LinearInFloat32(torch.nn.Linear):
    """A linear layer with 16-bit weights that returns float32.

    This is a class because a function set on the instance would refer back to the instance. Such a reference
    cycle would keep an unused model in memory.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bias = self.bias.float() if self.bias is not None else None
        return torch.nn.functional.linear(inputs.float(), self.weight.float(), bias)


def _rounded(dtype: torch.dtype, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


@torch.no_grad()
def score(model: torch.nn.Module, examples: Sequence[TokenizedExample]) -> Scores:
    """Return a model's token-by-token scores for the answers of the examples.

    Args:
        model: a model that accepts token ids and `logits_to_keep`, as transformers' models do.
    """
    device = next(model.parameters()).device
    return tuple(tuple(example.of_learnt(_score(model, example, device))) for example in examples)


def _score(model: torch.nn.Module, example: TokenizedExample, device: torch.device) -> list[TokenScore]:
    first = example.learnt[0][0]
    ids = torch.tensor([example.input_ids], device=device)
    # The logits at a position predict the next token; those at the last position predict none.
    logits = model(input_ids=ids, logits_to_keep=len(example.input_ids) - first + 1).logits[0, :-1].float()
    logprobs = logits.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, ids[0, first:, None])[:, 0]
    return [
        TokenScore(float(logprob), int(top_token))
        for logprob, top_token in zip(of_tokens.tolist(), logprobs.argmax(dim=-1).tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Made:
    """Outputs of a run that the parity report compares.

    Attributes:
        adapter: folder of the adapter, or None after full fine-tuning.
        formats: the folder of each format to serve, together with its measurements on the engine.
    """

    base: Path
    adapter: Path | None
    merged: Path
    formats: Mapping[Format, tuple[Path, EngineReading]]


def make_report(
    made: Made, recipe: Recipe, compared: Sequence[TokenizedExample], prompts: int, *, number_type: NumberType
) -> ParityReport:
    """Create the parity report of a run.

    Args:
        compared: the examples for which the engine's measurements contain scores.
        prompts: number of examples whose prompt tokens were compared.
        number_type: data type in which models are scored without an engine.
    """
    started = time.monotonic()
    checks: list[ParityCheck] = []
    differences: dict[str, Differences] = {}
    for format, (folder, reading) in made.formats.items():
        checks += [*_check_files(made.base, folder, format), _check_tokens(format, reading, prompts)]
    if all(check.passed for check in checks):  # unreadable files cannot be compared
        with waiting("Comparing the model to serve with the trained model"), library_output_to_log():
            more, differences = _compare(made, recipe, compared, number_type)
        checks += more
    return ParityReport(
        checks=tuple(checks),
        differences=differences,
        speed={format: reading.speed for format, (_, reading) in made.formats.items()},
        examples=len(compared),
        seconds=time.monotonic() - started,
    )


def _check_files(base: Path, folder: Path, format: Format) -> list[ParityCheck]:
    unreadable, files = unreadable_weights(folder), ", ".join(other_files(base, folder))
    keys, same = ", ".join(other_config(base, folder)), "identical to the base's, byte for byte"
    return [
        _check(f"{format}: weight files", not unreadable, unreadable or "complete", "complete"),
        _check(
            f"{format}: tokenizer, chat template, generation config",
            not files,
            f"{files} differ" if files else same,
            same,
        ),
        _check(f"{format}: config", not keys, f"{keys} differ" if keys else "same as the base's", "same as the base's"),
    ]


def _check_tokens(format: Format, reading: EngineReading, prompts: int) -> ParityCheck:
    wrong = reading.prompts_differ
    found = f"{prompts - len(wrong)} of {prompts} prompts match"
    if wrong:
        found += f"; the first that differs is example {wrong[0] + 1}"
    return _check(f"{format}: prompt tokens on the engine", not wrong, found, "the same token ids as in training")


def _compare(
    made: Made, recipe: Recipe, compared: Sequence[TokenizedExample], number_type: NumberType
) -> tuple[list[ParityCheck], dict[str, Differences]]:
    checks: list[ParityCheck] = []
    differences: dict[str, Differences] = {}
    trained = None
    if made.adapter is not None:
        on_nf4 = recipe.merge_dequantized
        applied, trained = _read_trained(made, made.adapter, compared, number_type, on_nf4=on_nf4)
        checks += _check_adapter(applied, adapter_parity.scale_of(made.adapter, recipe))
        release_memory()  # before the next model is loaded
        if recipe.base_quantization and not on_nf4:
            in_training = score(_load_trained(made.base, made.adapter, number_type, on_nf4=True), compared)
            differences[BESIDE_NF4] = between(in_training, trained)
            release_memory()
    merged = score(load(made.merged, number_type), compared)
    if trained is not None:
        merge = differences["merged compared with trained, both in transformers"] = between(trained, merged)
        if Format.MERGED not in made.formats:
            checks.append(_at_most(BESIDE_TRAINED, merge, _MAX_FLOOR))
    if Format.MERGED in made.formats:
        _, reading = made.formats[Format.MERGED]
        floor, served = between(merged, reading.scores), between(trained or merged, reading.scores)
        differences["engine compared with transformers, the same weights"] = floor
        differences["merged on the engine compared with trained"] = served
        limit = min(_MAX_FLOOR, max(_MIN_LIMIT, _TIMES_FLOOR * floor.mean))
        checks.append(_at_most("merged: engine compared with transformers, the same weights", floor, _MAX_FLOOR))
        checks.append(_at_most(BESIDE_TRAINED, served, limit))
    for format in (known for known in QUANTIZED_FORMATS if known in made.formats):
        folder, quantized = made.formats[format]
        off, layer = quantized_parity.compare(format, folder, made.merged)
        found, most = f"at most {off:.3f} of a layer's norm, in {layer}", quantized_parity.MAX_OFF[format]
        checks.append(_check(f"{format}: weight rounding", off <= most, found, f"at most {most}"))
        differences[f"{format} on the engine compared with trained"] = between(trained or merged, quantized.scores)
    return checks, differences


def _read_trained(
    made: Made, adapter: Path, compared: Sequence[TokenizedExample], number_type: NumberType, *, on_nf4: bool
) -> tuple[adapter_parity.Applied, Scores]:
    """Compare the adapter with the merged weights, and score held-out answers with base plus adapter.

    Args:
        on_nf4: whether the adapter was merged into the base's weights rounded to NF4.
    """
    model = _load_trained(made.base, adapter, number_type, on_nf4=on_nf4)
    return adapter_parity.compare(model, StoredWeights(made.merged)), score(model, compared)


def _load_trained(base: Path, adapter: Path, number_type: NumberType, *, on_nf4: bool) -> PeftModel:
    model = load(base, number_type)
    trained = load_adapter(round_layers_to_nf4(model) if on_nf4 else model, adapter)
    sum_in_float32(trained)
    return trained


def _check_adapter(applied: adapter_parity.Applied, scale: tuple[float, float] | None) -> list[ParityCheck]:
    found = f"applied between {applied.lowest:.3f} and {applied.highest:.3f} times, depending on the module"
    if applied.wrong is not None:
        found += f", wrong in {applied.wrong}"
    off = f"{1 - applied.off:.4%} of the weights equal base plus adapter, in {applied.module or 'all modules'}"
    checks = [
        _check("merge: the adapter is applied once", applied.wrong is None, found, "once, except for rounding"),
        _check("merge: base plus adapter", applied.off <= _NOT_THE_SUM, off, f"at least {1 - _NOT_THE_SUM:.1%}"),
    ]
    if scale is not None:
        written, wanted = scale
        checks.append(_check("merge: scale", written == wanted, f"{written:g}", f"{wanted:g}, from the recipe"))
    return checks


def _at_most(name: str, differences: Differences, limit: float) -> ParityCheck:
    found = (
        f"{differences.mean:.4f} nats per token on average, at most {differences.largest:.3f}, "
        f"same top-1 token at {differences.agreement:.1%} of positions"
    )
    return _check(name, differences.mean <= limit, found, f"at most {limit:.3f} on average")


def _check(name: str, passed: bool, found: str, expected: str) -> ParityCheck:
    return ParityCheck(name=name, passed=passed, found=found, expected=expected)


def between(first: Scores, second: Scores) -> Differences:
    """Return the differences between two scorings of the same examples: the second scoring minus the first."""
    pairs = [list(zip(before, after, strict=True)) for before, after in zip(first, second, strict=True)]
    same = [[before.top_token == after.top_token for before, after in example] for example in pairs]
    diverged = ((at, example.index(False)) for at, example in enumerate(same) if not all(example))
    return Differences(
        nats=tuple(tuple(after.logprob - before.logprob for before, after in example) for example in pairs),
        agreement=sum(map(sum, same)) / sum(map(len, same)),
        diverges_at=next(diverged, None),
    )
