"""The adapter of each method, as PEFT makes it.

Knows nothing of data or of the optimizer's run. Imports torch and PEFT.
"""

import warnings
from pathlib import Path

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from transformers import PreTrainedModel

from trainer.model.adalora import rank_plan
from trainer.model.target_modules import target_modules
from trainer.recipe.sections import Method, Recipe


def add_adapter(model: PreTrainedModel, recipe: Recipe, steps: int) -> PreTrainedModel | PeftModel:
    """The model with the recipe's adapter on it, in float32; the model itself for full fine-tuning.

    Args:
        steps: of the whole run; AdaLoRA plans by it.

    Raises:
        RecipeError: no layer is what `adapter.targets` asks for.
    """
    if recipe.method is Method.FULL:
        return model
    return get_peft_model(model, adapter_config(recipe, target_modules(model, recipe.adapter.targets), steps))


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """A model with a trained adapter on it."""
    with warnings.catch_warnings():
        # PEFT reads AdaLoRA's masks as ranks of plain LoRA, and says that none applies; they are applied all the same.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        return PeftModel.from_pretrained(model, str(adapter), use_safetensors=True)


def adapter_config(recipe: Recipe, targets: list[str] | str, steps: int) -> PeftConfig:
    """What PEFT is told.

    Args:
        targets: ends of layer names, or `all-linear`.
        steps: of the whole run.
    """
    adapter, common = recipe.adapter, {"target_modules": targets, "task_type": "CAUSAL_LM"}
    lora = common | {"lora_alpha": recipe.alpha, "lora_dropout": adapter.dropout}
    match recipe.method:
        case Method.VERA:
            return VeraConfig(
                r=recipe.rank, vera_dropout=adapter.dropout, projection_prng_key=recipe.train.seed, **common
            )
        case Method.ADALORA:
            return AdaLoraConfig(init_r=recipe.initial_rank, target_r=recipe.rank, **rank_plan(steps), **lora)
        case _:
            dora = recipe.method is Method.DORA
            return LoraConfig(r=recipe.rank, use_dora=dora, use_rslora=adapter.rslora, **lora)
