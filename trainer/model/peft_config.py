"""Creates the PEFT adapter for each training method.

This module is independent of the data and the optimizer. Imports torch and PEFT.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, transformers_weight_conversion
from peft.utils.other import is_gptqmodel_quant_linear
from safetensors.torch import load_file
from transformers import PreTrainedModel

from svc.errors import RecipeError
from trainer.model.adalora import rank_plan
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import linear_layers
from trainer.model.target_modules import target_modules
from trainer.recipe.adapter import GAUSSIAN, AdapterType, Method, TokenLayer
from trainer.recipe.recipe import Recipe
from trainer.recipe.targets import Targets


def add_adapter(
    model: PreTrainedModel, recipe: Recipe, steps: int, tokens: Sequence[int] = ()
) -> PreTrainedModel | PeftModel:
    """Return the model with the recipe's adapter in float32, or the unchanged model for full fine-tuning.

    Args:
        steps: number of steps in the complete run, which AdaLoRA's schedule needs.
        tokens: ids of new tokens, whose embedding rows are trained.

    Raises:
        RecipeError: the model has none of the layers in `adapter.targets`, or the method cannot train a
            mixture of experts.
    """
    if recipe.adapter_type is None:
        return model
    targets = target_modules(model, recipe.adapter.targets)
    experts = fused_experts(model) if recipe.adapter.targets is Targets.ALL_LINEAR else []
    if experts:
        _refuse_experts(recipe, experts)
        targets = sorted(linear_layers(model))
    _import_gptqmodel()
    with _targets_as_named():
        config: Any = adapter_config(recipe, targets, steps, experts)
        config.trainable_token_indices = _trained_rows(model, recipe, tokens) or None
        return get_peft_model(model, config)


def _trained_rows(model: PreTrainedModel, recipe: Recipe, tokens: Sequence[int]) -> dict[str, list[int]]:
    """Return the trained rows of the embedding and of the output head, keyed by layer. These are either all rows or
    only the rows of new tokens.

    If the head is tied to the embedding, PEFT updates both. With PEFT's `modules_to_save`, a tied head would
    become a separate copy that is no longer tied.
    """
    config, saved = model.config.get_text_config(), set(recipe.adapter.modules_to_save)
    if saved and config.tie_word_embeddings:
        saved = set(TokenLayer)
    names = {module: name for name, module in model.named_modules()}
    layers = {
        TokenLayer.EMBEDDING: names[model.get_input_embeddings()],
        TokenLayer.HEAD: names[model.get_output_embeddings()],
    }
    rows = {layer: range(config.vocab_size) if kind in saved else tokens for kind, layer in layers.items()}
    return {layer: list(ids) for layer, ids in rows.items() if ids}


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Return the model with a trained adapter. The adapter's weights are exactly the weights in its file, even if the
    model is in bf16.
    """
    _import_gptqmodel()
    with warnings.catch_warnings(), _targets_as_named():
        # PEFT mistakes AdaLoRA's masks for ranks of plain LoRA and warns that none applies; they are applied anyway.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        loaded = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
    if isinstance(loaded.active_peft_config, AdaLoraConfig):
        _load_unrounded(loaded, adapter)
    return loaded


@contextmanager
def loading_adapters() -> Iterator[None]:
    """Prepare PEFT for adapters that are loaded within the `with` block by means other than `load_adapter`."""
    _import_gptqmodel()
    with _targets_as_named():
        yield


def adapter_shapes(model: PreTrainedModel, adapter: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that PEFT saves for a LoRA adapter of the model, keyed by name.

    Args:
        model: the model on the meta device, to which the adapter is added.
        adapter: folder with adapter_config.json. Its weights are not read.

    Raises:
        ValueError: PEFT cannot add such an adapter to the model.
    """
    _import_gptqmodel()
    config = LoraConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = None  # PEFT warns if it is a different one
    config.init_lora_weights = False  # no start needs data or weights
    with _targets_as_named():
        added = get_peft_model(model, config)
    state = get_peft_model_state_dict(added, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _import_gptqmodel() -> None:
    """Import gptqmodel if it is installed. PEFT would otherwise import it when the first adapter of a process
    is added.

    For a missing optional package, gptqmodel stores the exception that was raised. The exception keeps every
    frame of its stack alive for as long as the process runs, and the frames of PEFT and its callers
    would keep the model alive. The import therefore runs in a thread, which has its own stack.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(is_gptqmodel_quant_linear, torch.nn.Module()).result()


def _load_unrounded(model: PeftModel, adapter: Path) -> None:
    """Load AdaLoRA's matrices again, without rounding.

    PEFT creates the matrices of the kept ranks in the base's data type, loads them, and converts them to
    float32 only afterwards, when bf16 has already rounded them.
    """
    weights = dict(model.named_parameters())
    name = model.active_adapter
    for key, trained in load_file(adapter / SAFETENSORS_WEIGHTS_NAME).items():
        weight = weights[f"{key}.{name}"]
        weight.data = trained.to(weight.device)


def _refuse_experts(recipe: Recipe, experts: list[str]) -> None:
    """Reject a training method that PEFT supports only for linear layers, not for experts.

    Raises:
        RecipeError: the recipe uses such a method; the message names the first expert.
    """
    named = f"{experts[0]!r} and {len(experts) - 1} more parameters of this mixture of experts hold a matrix per expert"
    if recipe.adapter_type is not AdapterType.LORA:
        raise RecipeError(
            f"{named}, but {recipe.adapter_type} supports only parameters with a single matrix",
            expected=f"method {Method.LORA}, {Method.QLORA} or {Method.FULL}",
            todo=f"set method to {Method.LORA}, or adapter.targets to {Targets.ATTENTION}, which skips the experts",
        )
    if recipe.adapter.dropout > 0:
        raise RecipeError(
            f"{named}, but adapter.dropout is {recipe.adapter.dropout}",
            expected="no dropout, because PEFT adds the update to these weights, not to their outputs",
            todo=f"remove adapter.dropout, or set adapter.targets to {Targets.ATTENTION}, which skips the experts",
        )
    if recipe.adapter.init is not None:
        raise RecipeError(
            f"{named}, but adapter.init: {recipe.adapter.init} is not available for such parameters",
            expected="no adapter.init",
            todo=f"remove adapter.init, or set adapter.targets to {Targets.ATTENTION}, which skips the experts",
        )


@contextmanager
def _targets_as_named() -> Iterator[None]:
    """Make PEFT use exactly the targets in its config within the `with` block.

    Recent releases of transformers store all experts of a layer in one parameter. For some mixtures of experts, PEFT
    mistakes our targets for module names from an older release and converts them: it drops shared experts and layers
    without experts, adds the router, and doubles the rank of one parameter.
    """
    before = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING = {}
    try:
        yield
    finally:
        transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING = before


def adapter_config(recipe: Recipe, targets: list[str] | str, steps: int, experts: Sequence[str] = ()) -> PeftConfig:
    """Return the PEFT config for the recipe's method.

    Args:
        targets: layer names, suffixes of layer names, or `all-linear`.
        steps: number of steps in the complete run.
        experts: names of the expert parameters, which are not linear layers. Only LoRA and QLoRA can train
            them.
    """
    adapter, common = recipe.adapter, {"target_modules": targets, "task_type": "CAUSAL_LM"}
    lora = common | {"lora_alpha": recipe.alpha, "lora_dropout": adapter.dropout}
    match recipe.adapter_type:
        case AdapterType.VERA:
            return VeraConfig(
                r=recipe.rank, vera_dropout=adapter.dropout, projection_prng_key=recipe.train.seed, **common
            )
        case AdapterType.ADALORA:
            return AdaLoraConfig(init_r=recipe.initial_rank, target_r=recipe.rank, **rank_plan(steps), **lora)
        case _:
            dora = recipe.adapter_type is AdapterType.DORA
            parameters = list(experts) or None
            return LoraConfig(
                r=recipe.rank,
                use_dora=dora,
                use_rslora=adapter.rslora,
                target_parameters=parameters,
                # trainer.model.residual_start makes the starts that change the base.
                init_lora_weights=GAUSSIAN if adapter.init == GAUSSIAN else True,
                **lora,
            )
