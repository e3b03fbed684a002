"""The adapter of each method, as PEFT makes it.

Knows nothing of data or of the optimizer's run. Imports torch and PEFT.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, transformers_weight_conversion
from peft.utils.other import is_gptqmodel_quant_linear
from safetensors.torch import load_file
from transformers import PreTrainedModel

from svc.errors import RecipeError
from trainer.model.adalora import rank_plan
from trainer.model.experts import fused_experts
from trainer.model.layer_shapes import linear_layers
from trainer.model.target_modules import target_modules
from trainer.recipe.sections import AdapterType, Method, Recipe
from trainer.recipe.targets import Targets


def add_adapter(model: PreTrainedModel, recipe: Recipe, steps: int) -> PreTrainedModel | PeftModel:
    """The model with the recipe's adapter on it, in float32; the model itself for full fine-tuning.

    Args:
        steps: of the whole run; AdaLoRA plans by it.

    Raises:
        RecipeError: no layer is what `adapter.targets` asks for, or the method cannot train the experts of a mixture.
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
        return get_peft_model(model, adapter_config(recipe, targets, steps, experts))


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A model with a trained adapter on it, whose numbers are those of its file also where the model's are bf16."""
    _import_gptqmodel()
    with warnings.catch_warnings(), _targets_as_named():
        # PEFT reads AdaLoRA's masks as ranks of plain LoRA, and says that none applies; they are applied all the same.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        loaded = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)
    if isinstance(loaded.active_peft_config, AdaLoraConfig):
        _load_unrounded(loaded, adapter)
    return loaded


def _import_gptqmodel() -> None:
    """Import gptqmodel if it is installed, as PEFT does while it adds the first adapter of a process.

    gptqmodel stores the exception of an optional package that is missing. The exception keeps every frame of the stack
    as long as the process lives, and the frames of PEFT and its callers keep the model. A thread has its own stack.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(is_gptqmodel_quant_linear, torch.nn.Module()).result()


def _load_unrounded(model: PeftModel, adapter: Path) -> None:
    """Loads AdaLoRA's matrices once more: for the ranks that were kept PEFT makes them anew in the base's number type,
    loads, and makes them float32 afterwards, when bf16 has rounded them."""
    weights = dict(model.named_parameters())
    name = model.active_adapter
    for key, trained in load_file(adapter / SAFETENSORS_WEIGHTS_NAME).items():
        weight = weights[f"{key}.{name}"]
        weight.data = trained.to(weight.device)


def _refuse_experts(recipe: Recipe, experts: list[str]) -> None:
    """Refuses what PEFT has for linear layers alone.

    Raises:
        RecipeError: names the first of these experts.
    """
    named = f"{experts[0]!r} and {len(experts) - 1} others of this mixture of experts have one matrix for each expert"
    if recipe.adapter_type is not AdapterType.LORA:
        raise RecipeError(
            f"{named}, and {recipe.adapter_type} changes single matrices only",
            expected=f"method {Method.LORA}, {Method.QLORA} or {Method.FULL}",
            todo=f"set method to {Method.LORA}, or adapter.targets to {Targets.ATTENTION}, which leaves experts alone",
        )
    if recipe.adapter.dropout > 0:
        raise RecipeError(
            f"{named}, and adapter.dropout is {recipe.adapter.dropout}",
            expected="no dropout: PEFT adds an update to such weights themselves, not to what comes out of them",
            todo=f"remove adapter.dropout, or set adapter.targets to {Targets.ATTENTION}, which leaves experts alone",
        )


@contextmanager
def _targets_as_named() -> Iterator[None]:
    """Inside, PEFT puts an adapter where its config says.

    It takes targets of some mixtures for those of adapters from before transformers had experts in one parameter, and
    changes them: shared experts and layers without experts drop out, the router comes in, and one rank doubles.
    """
    before = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING = {}
    try:
        yield
    finally:
        transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING = before


def adapter_config(recipe: Recipe, targets: list[str] | str, steps: int, experts: Sequence[str] = ()) -> PeftConfig:
    """What PEFT is told.

    Args:
        targets: layer names or ends of them, or `all-linear`.
        steps: of the whole run.
        experts: names of parameters that are no linear layers; LoRA's and QLoRA's only.
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
                r=recipe.rank, use_dora=dora, use_rslora=adapter.rslora, target_parameters=parameters, **lora
            )
