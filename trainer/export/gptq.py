"""Quantizes a merged model to 4 bits with GPTQ or AWQ, using gptqmodel.

Rounding is calibrated on training examples, never on held-out examples. GPTQ's activation order is `act_group_aware`,
because vLLM rejects `desc_act` with groups on every platform. On devices with slow bfloat16, GPTQ's layers are computed
in float32, which does not change the types in the files. The evaluation, not this module, measures the quality lost by
rounding.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.child_process import in_child_process
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.files.json_file import read_json_object
from svc.imports import without_garbage_collection
from svc.model_folder.chat_template import choose_template_kwargs
from svc.terminal import counting, waiting
from svc.version import Format
from trainer.base_model.content import CONFIG_FILE
from trainer.data.chat_template import tokenize_as_trained
from trainer.export.awq import awq_options, check_calibration, equal_blocks, exact_clipping
from trainer.export.four_bit_layers import check_layers
from trainer.export.quantized_files import check_packed, finish_folder, join_fused_layers, write_bfloat16
from trainer.library_output import library_output_to_log
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config
from trainer.recipe.quantize import Quantize
from trainer.recipe.recipe import Recipe

if TYPE_CHECKING:
    from gptqmodel import QuantizeConfig

_BITS = 4
"""Bits per weight. The engine's CPU kernel supports only 4-bit weights."""
_BATCH = 4  # calibration examples in one forward pass
_NO_LOSS = "not applicable"
_SCALE_ERROR = 2.0
"""Exponent to which rounding errors are raised when choosing a group's scale. The chosen scale minimizes the sum of
these powers, and may clip the largest weight."""
_GRID, _MAX_SHRINK = 20, 0.5
"""gptqmodel's settings `grid` and `maxshrink` for the scale search: in steps of 1/20, it tries 1, 0.95, ..., 0.55 times
the scale that reaches the largest weight. gptqmodel's default of 80 steps, down to 0.21, takes eight times as long and
made no difference on 400 held-out examples of the example task."""
_CPU_BLOCK = 32
"""Number of columns in a block. The columns of a block are rounded one after another; then the remaining columns of the
layer are corrected for the whole block at once. With gptqmodel's default of 128, each rounded column corrects up to
four times as many columns within its block. The result is the same, except that here the scales take more of the
corrections into account."""


@dataclass(frozen=True, slots=True)
class QuantizeSummary:
    """Summary of a quantization run.

    Attributes:
        layers: number of quantized linear layers and expert matrices.
        samples: number of calibration examples.
        tokens: number of tokens in those examples.
        worst_layer: layer whose output was changed most by rounding.
        worst_loss: gptqmodel's mean squared error of that layer on the calibration examples.
        seconds: total time.
    """

    layers: int
    samples: int
    tokens: int
    worst_layer: str
    worst_loss: float
    seconds: float


def quantize_to_4_bits(
    format: Format,
    model: Path,
    calibration: Sequence[ChatExample],
    recipe: Recipe,
    out: Path,
    *,
    number_type: NumberType,
) -> QuantizeSummary:
    """Write a model to `out` as 4-bit safetensors, with its tokenizer and chat template.

    Args:
        format: GPTQ or AWQ.
        model: folder of the merged model.
        calibration: training examples on which rounding is calibrated (`pick_calibration`).
        out: output folder, created if missing. Identical input gives an identical config.json.
        number_type: data type used in training. It affects the precision of the calibration, but not the data types in
            the files.

    Raises:
        RecipeError: `quantize.group_size` does not fit the model; raised before any work is done.
        TrainingError: a layer was not quantized.
    """
    started = time.monotonic()
    layers = check_layers(model, recipe.quantize.group_size)
    rows = calibration_rows(model, calibration, recipe)
    texts = equal_blocks(rows) if format is Format.AWQ else rows
    computed = calibration_type(number_type)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{format}-", dir=out.parent) as work:
        copy, offload = Path(work, "model"), Path(work, "offload")
        offload.mkdir()
        link_with_padding(model, copy)
        work_in = (copy, texts, recipe.quantize, out, str(offload), computed)
        log = in_child_process(_run_gptqmodel, format, *work_in)
    if computed is not NumberType.BFLOAT16:
        write_bfloat16(out)
    join_fused_layers(out, layers)
    check_packed(out, layers)
    finish_folder(model, out)
    # AWQ has no loss for a layer without scales, such as `o_proj` with grouped-query attention.
    worst = max((entry for entry in log if entry["loss"] != _NO_LOSS), key=lambda entry: float(entry["loss"]))
    return QuantizeSummary(
        layers=len(layers),
        samples=len(calibration),
        tokens=sum(map(len, rows)),
        worst_layer=f"{worst['layer']}.{worst['module']}",
        worst_loss=float(worst["loss"]),
        seconds=time.monotonic() - started,
    )


def calibration_rows(model: Path, calibration: Sequence[ChatExample], recipe: Recipe) -> list[tuple[int, ...]]:
    """Return the token ids of the calibration examples, truncated to `train.max_length` as in training."""
    rows = tokenize_as_trained(model, calibration, choose_template_kwargs(model, recipe.chat_template_kwargs))
    return [row.input_ids[: recipe.train.max_length] for row in rows]


def pick_calibration(examples: Sequence[ChatExample], samples: int, seed: int) -> list[ChatExample]:
    """Return `samples` examples drawn at random with the given seed. If there are fewer examples, return all of
    them in random order.
    """
    drawn = random.Random(seed).sample(range(len(examples)), min(samples, len(examples)))  # noqa: S311
    return [examples[index] for index in drawn]


def calibration_type(number_type: NumberType) -> NumberType:
    """Return the data type in which calibration computes layers, given the data type of training.

    It is never float16, because activations can exceed 65504 and loss scaling does not help here. Float32
    needs more memory for only one layer at a time, and converting weights from bf16 and back involves no
    rounding.
    """
    return NumberType.BFLOAT16 if number_type is NumberType.BFLOAT16 else NumberType.FLOAT32


def link_with_padding(model: Path, copy: Path) -> None:
    """Create a folder that links to a model's files but has its own config, whose padding token has an embedding row.

    gptqmodel pads calibration examples and masks the padding. If the config names no padding token, or a token that
    also has another role, gptqmodel searches the vocabulary for common names and may choose a token without an
    embedding row.
    """
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    config = load_config(model).get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    padding = next(token for token in range(config.vocab_size) if token not in (config.bos_token_id, *ends))
    (copy / CONFIG_FILE).unlink()
    content = read_json_object(model / CONFIG_FILE) | {"pad_token_id": padding}
    (copy / CONFIG_FILE).write_text(json.dumps(content), "utf-8")


def _run_gptqmodel(
    format: Format,
    model: Path,
    calibration: list[tuple[int, ...]],
    quantize: Quantize,
    out: Path,
    offload: str,
    number_type: NumberType,
) -> list[dict[str, Any]]:
    """Quantize and save a model, and return gptqmodel's record of every layer.

    This runs in a separate process, because gptqmodel's threads continue after an exception and abort the
    process when it exits.

    Args:
        offload: an empty folder for temporary files.
    """
    # gptqmodel sizes its thread pool by this, and on two cores its own default is too small for its model loader.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    with waiting("Loading the merged model"), library_output_to_log():
        with without_garbage_collection():
            import torch
            from gptqmodel import BACKEND, GPTQModel

        awq = format is Format.AWQ
        config = awq_options(quantize.group_size, offload) if awq else _gptq_options(quantize, offload)
        # The other backends for AWQ need a GPU, and write the same files.
        backend = {"backend": BACKEND.AWQ_TORCH} if awq else {}
        attention = attention_implementation(load_config(model))
        dtype = getattr(torch, number_type)
        quantized = GPTQModel.load(str(model), config, attn_implementation=attention, dtype=dtype, **backend)
    with counting("Quantizing layers", quantized.model.config.get_text_config().num_hidden_layers) as advance:

        def layer_complete(*, layer_idx: int, submodule_finalized: bool) -> None:
            if submodule_finalized:
                advance()

        quantized.layer_callback = layer_complete
        ids = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in calibration]
        # gptqmodel creates a folder of logs in the working folder.
        faster = exact_clipping() if awq else faster_rounding(cpu=not torch.cuda.is_available())
        with library_output_to_log(), chdir(offload), faster:
            log = quantized.quantize(ids, batch_size=_BATCH, calibration_data_min_length=1, **backend)
            entries = [entry for entries in log.values() for entry in entries]
            if awq:
                check_calibration(entries)
            quantized.save(str(out.absolute()))
    return entries


def _gptq_options(quantize: Quantize, offload: str) -> "QuantizeConfig":
    from gptqmodel import QuantizeConfig

    return QuantizeConfig(
        bits=_BITS,
        group_size=quantize.group_size,
        desc_act=False,
        act_group_aware=True,
        true_sequential=quantize.sequential,
        mse=_SCALE_ERROR,
        # On a CPU too: layers are read one by one from the files, and removed from main memory when finished.
        offload_to_disk=True,
        offload_to_disk_path=offload,
    )


@contextmanager
def faster_rounding(*, cpu: bool) -> Iterator[None]:
    """Make gptqmodel use our scale search and block size within the `with` block.

    This replaces gptqmodel's methods, because gptqmodel has no options for either.

    Args:
        cpu: whether the layers are on a CPU; on a GPU, gptqmodel has a kernel for its own block size.
    """
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.quantization.quantizer import Quantizer

    configure, quantize = Quantizer.configure, GPTQ.quantize
    Quantizer.configure = partialmethod(configure, grid=_GRID, maxshrink=_MAX_SHRINK)
    if cpu:
        GPTQ.quantize = partialmethod(quantize, blocksize=_CPU_BLOCK)
    try:
        yield
    finally:
        Quantizer.configure, GPTQ.quantize = configure, quantize
