"""Checks within seconds, before the first stage starts, that a base supports every stage of the run.

Problems with the base are reported here instead of hours later: a config that cannot be copied, a tokenizer that does
not belong to the weights, layers that cannot be quantized, or an architecture that vLLM does not support.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from svc.engine.device import DeviceCapabilities
from svc.errors import BaseModelError, RecipeError
from svc.model_folder.chat_template import choose_template_kwargs
from svc.registry.files import hash_tensor, read_headers
from svc.settings.engine import Device, EngineSettings
from svc.terminal import waiting
from svc.version import SERVED_FORMATS, Format
from trainer.base_model.content import copy_shipped_files
from trainer.base_model.vllm_check import model_check
from trainer.data.chat_template import check_ending, load_tokenizer, stop_tokens
from trainer.data.vocabulary import check_tokenizer
from trainer.evaluation.parity.files import other_config, other_files
from trainer.export import eight_bits
from trainer.export.awq import check_awq
from trainer.export.four_bit_layers import check_layers, check_quantizer
from trainer.model.config import load_config
from trainer.model.layer_shapes import linear_layers, without_weights
from trainer.model.target_modules import target_layers
from trainer.recipe.recipe import Recipe
from trainer.training.optimizer import check_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_base(
    base: Path,
    recipe: Recipe,
    capabilities: DeviceCapabilities,
    engine: EngineSettings,
) -> None:
    """Check that a base supports everything that the recipe needs.

    Args:
        base: folder of the base model.
        capabilities: capabilities of this machine.

    Raises:
        BaseModelError: the base itself is faulty.
        IntegrityError: a weight file of the base is damaged.
        RecipeError, TrainingError: the base's layers cannot be quantized, at least not with these options,
            or the optimizer does not work on this machine.
        EngineError: vLLM does not start, or is too slow with one of the formats.
    """
    check_optimizer(recipe.train.optimizer, cuda=capabilities.training_device is Device.CUDA)
    served = not set(recipe.formats).isdisjoint(SERVED_FORMATS)
    with model_check(base, engine) if served else nullcontext() as checked, waiting("Checking the base model"):
        config = load_config(base)
        _check_architecture(base, config)
        _check_weights(base, config)
        if served:
            _check_long_rope(base, config, engine.max_model_len)
        _check_copy(base)
        tokenizer = load_tokenizer(base)
        stops = stop_tokens(base, tokenizer)
        check_tokenizer(base, tokenizer, stops, config.get_text_config().vocab_size)
        check_ending(base, tokenizer, stops, choose_template_kwargs(base, recipe.chat_template_kwargs))
        if recipe.adapter.starts_from_base:
            _check_rank(config, recipe)
        if {Format.GPTQ, Format.AWQ} & set(recipe.formats):
            check_layers(base, recipe.quantize.group_size, capabilities.gptq_multiple(engine))
            check_quantizer(base)
        if Format.AWQ in recipe.formats:
            check_awq(base, capabilities.training_type)
        if {Format.INT8, Format.FP8} & set(recipe.formats):
            sizes = eight_bits.check_layers(base).values()
            if Format.FP8 in recipe.formats:
                capabilities.check_fp8_weights(sum(inputs * outputs for inputs, outputs in sizes), engine)
        if checked is not None:
            checked.wait()


def _check_architecture(base: Path, config: "PreTrainedConfig") -> None:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BaseModelError(
            f"{base} has model_type {config.model_type!r}, for which transformers has no causal language model",
            expected="a causal language model",
            todo="choose another base",
        )


def _check_rank(config: "PreTrainedConfig", recipe: Recipe) -> None:
    """Reject a rank above the smaller dimension of a target layer, because PiSSA and OLoRA cannot use such a rank."""
    model = without_weights(config)
    sizes = linear_layers(model)
    smallest = min(target_layers(model, recipe.adapter.targets), key=lambda name: min(sizes[name]))
    if recipe.rank > min(sizes[smallest]):
        raise RecipeError(
            f"adapter.rank is {recipe.rank}, but {smallest} has shape {' x '.join(map(str, sizes[smallest]))}",
            expected=f"a rank of at most {min(sizes[smallest])} with adapter.init: {recipe.adapter.init}",
            todo=f"set adapter.rank to {min(sizes[smallest])}, or choose other layers with adapter.targets",
        )


def _check_weights(base: Path, config: "PreTrainedConfig") -> None:
    """Reject damaged weight files, and output weights that differ from the embedding although the config ties
    the two.

    If they differ, transformers keeps both matrices, while vLLM drops the output weights.
    """
    names = [tensor.name for tensor in read_headers(base)]
    if not config.get_text_config().tie_word_embeddings:
        return
    head = next((name for name in names if name.endswith("lm_head.weight")), None)
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    if head and embedding and hash_tensor(base, head) != hash_tensor(base, embedding):
        raise BaseModelError(
            f"the config of {base} ties the output layer to the embedding, but its files contain two different "
            "matrices: training would use both, and the engine only one of them",
            expected="tie_word_embeddings: false in config.json, or one matrix for the embedding and the output layer",
            todo=f"set tie_word_embeddings to false in {base / 'config.json'}",
        )


def _check_long_rope(base: Path, config: "PreTrainedConfig", max_model_len: int) -> None:
    """Reject a context length at which vLLM rotates positions differently from training (Phi-3.5: above 4,096).

    LongRoPE has separate factors for short and long texts. transformers chooses between them by the length
    of each text, whereas vLLM chooses once for all requests, by the maximum length that it accepts.
    """
    rope = config.get_text_config().rope_parameters or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and max_model_len > original:
        raise BaseModelError(
            f"{base} has separate LongRoPE factors for texts of up to {original} tokens and for longer texts. With "
            f"engine.max_model_len: {max_model_len}, vLLM uses the factors for longer texts in every request, but "
            "training uses them only for longer texts",
            expected=f"engine.max_model_len of at most {original}",
            todo=f"set engine.max_model_len to {original}",
        )


def _check_copy(base: Path) -> None:
    """Check that the comparison used in the parity report finds no difference between the base and an unchanged copy
    of it.
    """
    with tempfile.TemporaryDirectory(prefix="base-copy-") as folder:
        copy = Path(folder)
        copy_shipped_files(base, copy)
        if different := [*other_files(base, copy), *other_config(base, copy)]:
            raise BaseModelError(
                f"transformers reads an exact copy of {base} differently than the original; these files or config keys "
                f"differ: {', '.join(different)}",
                expected="a base that transformers reads in the same way as an exact copy of it",
                todo="open an issue with the base's config.json, or choose another base",
            )
