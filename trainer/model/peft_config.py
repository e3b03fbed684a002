"""The adapter of each method, as PEFT makes it, and what AdaLoRA needs besides.

AdaLoRA is more than a kind of layer: after each step somebody must tell its allocator, which masks the directions that
matter least, and neither transformers' trainer nor TRL's does. Knows nothing of data or of the optimizer's run.

Loaded only inside functions: it imports torch and PEFT.
"""

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svc.engine.capabilities import NumberType
from svc.errors import TrainingError
from trainer.model.acceleration import Attention
from trainer.model.attention import attention_implementation
from trainer.model.target_modules import target_modules
from trainer.recipe.sections import Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ALLOCATOR_FILE = "rank_allocator.safetensors"
_WARMUP, _FINAL = 0.1, 0.3
"""Shares of all steps in which AdaLoRA keeps all ranks at first, and keeps the ranks that it has chosen at last."""


def load_model(
    base: Path,
    method: Method,
    attention: Attention = Attention.SDPA,
    *,
    number_type: NumberType,
) -> "PreTrainedModel":
    """The base model in the form that the method trains on.

    Full fine-tuning steps on float32 weights, which the forward pass rounds to the number type: Adam's small steps
    vanish in 16 bits. Frozen weights are in the number type, or for QLoRA in NF4, whose scales are quantized too.

    Args:
        base: folder of the base model.
        number_type: in which matrix products are computed.
        attention: the fastest that the machine has.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quantization = None
    if method is Method.QLORA:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, number_type),
        )
    dtype = torch.float32 if method is Method.FULL else getattr(torch, number_type)
    implementation: str | None = attention.value
    if attention is Attention.SDPA:  # FlashAttention knows soft caps
        implementation = attention_implementation(AutoConfig.from_pretrained(base)) or implementation
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=quantization, attn_implementation=implementation
    )
    if method is Method.QLORA:
        _keep_layout(model)
    return model


def _keep_layout(model: "PreTrainedModel") -> None:
    """Keeps bitsandbytes from packing weights for a kernel of CPUs with bfloat16, and from then on multiplying by it.

    It does so as soon as held-out loss is measured; the kernel knows no gradient and no float32, and nothing goes back.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def add_adapter(model: "PreTrainedModel", recipe: Recipe, steps: int) -> "PreTrainedModel | PeftModel":
    """The model with the recipe's adapter on it, in float32; the model itself for full fine-tuning.

    Args:
        steps: of the whole run; AdaLoRA plans by it.

    Raises:
        RecipeError: no layer is what `adapter.targets` asks for.
        TrainingError: too few steps for AdaLoRA.
    """
    if recipe.method is Method.FULL:
        return model
    return get_peft_model(model, adapter_config(recipe, target_modules(model, recipe.adapter.targets), steps))


def load_adapter(model: "PreTrainedModel", adapter: Path) -> PeftModel:
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

    Raises:
        TrainingError: too few steps for AdaLoRA.
    """
    adapter, common = recipe.adapter, {"target_modules": targets, "task_type": "CAUSAL_LM"}
    lora = common | {"lora_alpha": recipe.alpha, "lora_dropout": adapter.dropout}
    match recipe.method:
        case Method.VERA:
            return VeraConfig(
                r=recipe.rank, vera_dropout=adapter.dropout, projection_prng_key=recipe.train.seed, **common
            )
        case Method.ADALORA:
            warmup, final = round(_WARMUP * steps), round(_FINAL * steps)
            if steps - warmup - final < 2:
                raise TrainingError(
                    f"the run has {steps} steps, too few for AdaLoRA to share out ranks",
                    expected="at least 3 steps; some hundred are where it pays",
                    todo="raise train.epochs, lower train.batch_size, or use method lora",
                )
            plan = {"total_step": steps, "tinit": warmup, "tfinal": final, "deltaT": max(1, steps // 100)}
            return AdaLoraConfig(init_r=recipe.initial_rank, target_r=recipe.rank, **plan, **lora)
        case _:
            dora = recipe.method is Method.DORA
            return LoraConfig(r=recipe.rank, use_dora=dora, use_rslora=adapter.rslora, **lora)


class RankAllocation(TrainerCallback):
    """Tells AdaLoRA's allocator of each step, between the optimizer's step and the end of its gradients.

    Args:
        model: with an AdaLoRA adapter.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """`global_step` counts this step only afterwards."""
        step, config = state.global_step + 1, self._model.peft_config["default"]
        measures = step < config.total_step - config.tfinal
        # In float16 the optimizer leaves out a step whose gradients are not finite: means of importance would stay so.
        if not (measures and kwargs["optimizer"].step_was_skipped):
            self._model.base_model.update_and_allocate(step)

    def save(self, folder: Path) -> None:
        """Writes the allocator's running means and its masks beside a checkpoint's weights."""
        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        tensors = {f"{kind}/{name}": value for kind, values in kinds.items() for name, value in values.items()}
        save_file(tensors, folder / _ALLOCATOR_FILE, {"rank_pattern": json.dumps(config.rank_pattern)})

    def restore(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        from safetensors import safe_open

        allocator, config = self._model.base_model.rankallocator, self._model.peft_config["default"]
        kinds = {"ipt": allocator.ipt, "mean": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        device = next(self._model.parameters()).device
        for key, value in load_file(folder / _ALLOCATOR_FILE, device=str(device)).items():
            kind, _, name = key.partition("/")
            kinds[kind][name] = value
        with safe_open(folder / _ALLOCATOR_FILE, framework="pt") as file:
            config.rank_pattern = json.loads(file.metadata()["rank_pattern"])
