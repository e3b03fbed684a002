"""Checks that the options chosen for a training run are really active, and stops the run if they are not.

Libraries ignore some options silently: Liger replaces nothing in a model that it does not know, transformers uses a
different FlashAttention than requested, and bitsandbytes stores the optimizer moments of small tensors in float32. Such
a run would be slower or need more memory than estimated, without any message. Options that can be checked without a
step are checked before the first step; the other options are observed during the first step. Imports torch,
transformers and PEFT.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from svc.engine.device import NumberType
from svc.errors import TrainingError
from trainer.model.acceleration import Acceleration, Attention
from trainer.model.attention import attention_implementation
from trainer.recipe.adapter import Quantization
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Optimizer
from trainer.training.cpu.fused_attention import NAME as FUSED_ATTENTION

_MIN_8BIT, _MIN_PAGED = 4096, 100_000
"""Minimum number of elements in a weight for bitsandbytes to store the weight's moments in 8 bits, and to page them."""
_REINSTALL_FLASH = "install a flash-attn made for this torch and transformers, or remove it: pip uninstall flash-attn"
_REPORT = "report this with the output of: pip list"


class MechanismCheck(TrainerCallback):
    """Checks a trainer when training begins and after its first step.

    Args:
        trainer: trainer of a run, complete except for its optimizer.
        acceleration: options chosen for this machine.
        number_type: data type of the matrix products.
    """

    def __init__(self, trainer: Trainer, acceleration: Acceleration, recipe: Recipe, number_type: NumberType) -> None:
        self._trainer = trainer
        self._acceleration, self._recipe, self._number_type = acceleration, recipe, number_type
        self._first_step: FirstStep | None = None
        self._done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the model, the batches and the optimizer.

        Raises:
            TrainingError: an option chosen for the run has no effect.
        """
        trainer, chosen, recipe = self._trainer, self._acceleration, self._recipe
        model = trainer.model
        check_attention(model, chosen.attention)
        check_liger(model, chosen=chosen.liger_kernels)
        check_checkpointing(model, chosen=args.gradient_checkpointing)
        check_number_types(model, self._number_type)
        if recipe.base_quantization is Quantization.NF4:
            check_nf4(model, self._number_type)
        if chosen.padding_free:
            rows = [trainer.train_dataset[0]] * 2
            check_padding_free(trainer.data_collator(rows), rows)
        check_optimizer_class(inner_optimizer(trainer), recipe.train.optimizer, fused="fused" in args.optim)
        check_lora_plus(inner_optimizer(trainer), model, args.learning_rate, recipe.train.lora_plus_ratio)
        self._first_step = FirstStep(model, self._number_type, one_row=chosen.padding_free)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the effects of the first step. With a scaled loss, a step may be skipped without an update; then the
        next step is checked.

        Raises:
            TrainingError: an option chosen for the run has no effect.
        """
        if self._first_step is not None:
            self._first_step.check(checkpointing=args.gradient_checkpointing)
            self._first_step = None
        optimizer = inner_optimizer(self._trainer)
        if not self._done and any(optimizer.state.values()):
            check_moments(optimizer, self._trainer.model, self._recipe.train.optimizer)
            self._done = True


class FirstStep:
    """Observes how the model's layers are called, until the first step has ended.

    Args:
        number_type: data type in which layers must compute.
        one_row: whether every batch must be a single row.
    """

    def __init__(self, model: nn.Module, number_type: NumberType, *, one_row: bool) -> None:
        self._recomputed, self._number_type, self._one_row = False, number_type, one_row
        # Not only the first layer, which may belong to an encoder of images that text does not pass through.
        self._handles = [
            layer.register_forward_pre_hook(self._observe, with_kwargs=True) for layer in checkpointed_layers(model)
        ]

    def _observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.training:
            return
        if torch._C._current_graph_task_id() != -1:  # called by the backward pass
            self._recomputed = True
            return
        device = next(layer.parameters()).device.type
        computes = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        if computes is not getattr(torch, self._number_type):
            found = f"a layer computes in {_name(computes)}"
            raise _inactive(f"matrix products in {self._number_type}", found, str(self._number_type), _REPORT)
        if not self._one_row:
            return
        hidden, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        if len(hidden) > 1 or isinstance(mask, torch.Tensor):
            found = f"a layer got {len(hidden)} rows" + ("" if mask is None else " and a mask")
            raise _inactive("batches without padding", found, "one row without a mask", _REPORT)

    def check(self, *, checkpointing: bool) -> None:
        """Stop observing, and check whether the backward pass recomputed the layers."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        if self._recomputed is not checkpointing:
            raise _inactive(
                f"train.gradient_checkpointing: {str(checkpointing).lower()}",
                f"the backward pass {'recomputed' if self._recomputed else 'did not recompute'} the layers",
                "layers that are computed twice" if checkpointing else "layers that are computed once",
                f"set train.gradient_checkpointing to {str(not checkpointing).lower()}",
            )


def check_attention(model: nn.Module, chosen: Attention) -> None:
    """Check the implementation of every attention layer.

    Raises:
        TrainingError: a layer uses a different implementation.
    """
    config = getattr(model, "config", None)
    expected = {chosen.value}
    if chosen is Attention.SDPA:
        expected = {(config and attention_implementation(config)) or chosen.value, FUSED_ATTENTION}
    found = {
        f"{name} uses {module.config._attn_implementation}"
        for name, module in model.named_modules()
        if _is_attention(module) and module.config._attn_implementation not in expected
    }
    if found:
        raise _inactive(chosen.value, _first_of(found), " or ".join(sorted(expected)), _REINSTALL_FLASH)


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and hasattr(getattr(module, "config", None), "_attn_implementation")


def check_liger(model: nn.Module, *, chosen: bool) -> None:
    """Check that Liger has replaced a part of every layer if it was chosen, and has replaced nothing if it was not.

    Raises:
        TrainingError: Liger was chosen but is not active, or is active although it was not chosen.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    wrong = {name for name, layer in layers.items() if any(map(_is_liger, layer.modules())) is not chosen}
    if wrong or (chosen and not layers):
        raise _inactive(
            f"Liger kernels: {'on' if chosen else 'off'}",
            f"{len(wrong)} of {len(layers)} layers have {'no' if chosen else 'some'} Liger kernels",
            f"Liger kernels in {'every layer' if chosen else 'no layer'}",
            "update liger-kernel, or remove it: pip uninstall liger-kernel",
        )


def _is_liger(module: nn.Module) -> bool:
    """Return whether a module computes with Liger, which binds its own `forward` to the modules of a loaded
    model.
    """
    forward = getattr(module.forward, "__func__", module.forward)
    return str(getattr(forward, "__module__", "")).startswith("liger_kernel.")


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that support gradient checkpointing, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_checkpointing(model: nn.Module, *, chosen: bool) -> None:
    """Check that gradient checkpointing is on in every layer if it was chosen, and off in every layer if it was not.

    Raises:
        TrainingError: checkpointing was chosen but is off in a layer, or is on although it was not chosen.
    """
    layers = checkpointed_layers(model)
    wrong = [layer for layer in layers if layer.gradient_checkpointing is not chosen]
    if wrong or (chosen and not layers):
        raise _inactive(
            f"train.gradient_checkpointing: {str(chosen).lower()}",
            f"checkpointing is {'off' if chosen else 'on'} in {len(wrong)} of {len(layers)} layers",
            f"{'on' if chosen else 'off'} in every layer",
            f"set train.gradient_checkpointing to {str(not chosen).lower()}",
        )


def check_number_types(model: nn.Module, number_type: NumberType) -> None:
    """Check the data types of weights. Trained weights must be in float32. The frozen weights of layers with an adapter
    must be in the data type of the matrix products. Layers that transformers keeps in float32 may stay in float32.

    Raises:
        TrainingError: a weight has a different data type.
    """
    trained = {
        f"{name} is in {_name(weight.dtype)}"
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.dtype is not torch.float32
    }
    if trained:
        raise _inactive("trained weights in float32", _first_of(trained), "float32", _REPORT)
    narrow = getattr(torch, number_type)
    frozen = {
        f"{name} is in {_name(layer.weight.dtype)}"
        for name, layer in _adapted_layers(model)
        if layer.weight.is_floating_point()
        and layer.weight.dtype not in ({narrow, torch.float32} if _stays_wide(model, name) else {narrow})
    }
    if frozen:
        raise _inactive(f"frozen weights in {number_type}", _first_of(frozen), str(number_type), _REPORT)


def check_nf4(model: nn.Module, number_type: NumberType) -> None:
    """Check that the linear layers that an adapter changes are stored in NF4 with quantized scales, and that
    they compute in the given data type.

    Raises:
        TrainingError: a layer is stored in a different form, or computes in a different data type.
    """
    from bitsandbytes.nn.modules import Linear4bit

    layers, wrong = dict(_adapted_layers(model)), set()
    for name, layer in layers.items():
        # A share of a weight has no state: bitsandbytes takes that of the layer when the weight is gathered.
        state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
        # Weights packed into floats would be wrong if a copy normalized their NaN (bitsandbytes issue 1945).
        packed = isinstance(layer, Linear4bit) and layer.weight.dtype is torch.uint8
        if not packed or state is None or state.quant_type != "nf4" or not state.nested:
            wrong.add(f"{name} is a {type(layer).__name__} with weights in {_name(layer.weight.dtype)}")
        elif layer.compute_dtype is not getattr(torch, number_type):
            wrong.add(f"{name} computes in {_name(layer.compute_dtype)}")
    if wrong or not layers:
        todo = "update bitsandbytes: pip install -U bitsandbytes, or remove `quantization`"
        raise _inactive("quantization: nf4", _first_of(wrong or {"no layer is adapted"}), "layers in NF4", todo)


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the base's linear layers that the adapter changes."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer):  # the output head, of which only rows change
            continue
        if isinstance(module, BaseTunerLayer) and isinstance(layer := module.get_base_layer(), nn.Linear):
            yield name, layer


def _stays_wide(model: nn.Module, name: str) -> bool:
    """Return whether transformers keeps a module in float32 although the model is loaded in 16 bits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = {*(getattr(base, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(base, "_keep_in_fp32_modules_strict", None) or ())}
    return any(part in name for part in kept)


def check_padding_free(batch: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Check that a batch joins its rows into a single row, in which positions restart with each example.

    Args:
        rows: the rows from which the collator made the batch.

    Raises:
        TrainingError: the batch is padded, or its examples are not separated.
    """
    examples = sum(len(row.get("seq_lengths", [0])) for row in rows)
    positions = batch.get("position_ids")
    starts = 0 if positions is None else int((positions == 0).sum())
    shape = tuple(batch["input_ids"].shape)
    if shape[0] != 1 or "attention_mask" in batch or starts != examples:
        raise _inactive(
            "batches without padding",
            f"{len(rows)} rows with {examples} examples became a batch of shape {shape} with {starts} example starts",
            f"one row with {examples} example starts and no attention mask",
            _REPORT,
        )


def inner_optimizer(trainer: Trainer) -> torch.optim.Optimizer:
    """Return a trainer's optimizer without accelerate's wrapper."""
    optimizer: torch.optim.Optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer


def check_optimizer_class(optimizer: torch.optim.Optimizer, chosen: Optimizer, *, fused: bool) -> None:
    """Check the optimizer's class and options, and that they affect at least one weight.

    Args:
        fused: whether PyTorch's fused kernel was chosen.

    Raises:
        TrainingError: a different optimizer is used, or no trained tensor has enough elements for the chosen
            optimizer to take effect.
    """
    if chosen is Optimizer.ADAMW:
        if type(optimizer) is not torch.optim.AdamW or bool(optimizer.defaults["fused"]) is not fused:
            found = f"{type(optimizer).__name__} with fused={optimizer.defaults.get('fused')}"
            raise _inactive(f"train.optimizer: {chosen}", found, f"AdamW with fused={fused}", _REPORT)
        return
    from bitsandbytes.optim.optimizer import Optimizer2State

    bits = 8 if chosen.is_8bit else 32
    found_bits = getattr(optimizer.args, "optim_bits", None) if isinstance(optimizer, Optimizer2State) else None
    paged = bool(getattr(optimizer, "is_paged", False))
    if found_bits != bits or paged is not chosen.is_paged:
        found = f"{type(optimizer).__name__} with {found_bits or 'no'} bits, {'paged' if paged else 'not paged'}"
        expected = f"bitsandbytes' AdamW with {bits} bits, {'paged' if chosen.is_paged else 'not paged'}"
        raise _inactive(f"train.optimizer: {chosen}", found, expected, "update bitsandbytes and transformers")
    largest = max(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    for needed, smallest, what in ((chosen.is_8bit, _MIN_8BIT, "8-bit"), (chosen.is_paged, _MIN_PAGED, "paged")):
        if needed and largest < smallest:
            raise _inactive(
                f"train.optimizer: {chosen}",
                f"no weight has {what} optimizer moments: the largest trained weight has {largest:,} elements",
                f"a weight of at least {smallest:,} elements",
                f"set train.optimizer to {Optimizer.ADAMW}",
            )


def check_lora_plus(
    optimizer: torch.optim.Optimizer, model: nn.Module, learning_rate: float, ratio: float | None
) -> None:
    """Check that LoRA's B matrices have their own peak learning rate, and that all other trained matrices have the
    recipe's learning rate. Vectors, such as DoRA's magnitudes, are not checked.

    Args:
        ratio: learning rate of B as a multiple of A's learning rate, or None if both are the same.

    Raises:
        TrainingError: a matrix has a different learning rate.
    """
    rates = {
        id(weight): group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    wrong = set()
    for name, weight in model.named_parameters():
        expected = learning_rate * (ratio or 1) if ".lora_B." in name else learning_rate
        rate = rates.get(id(weight), expected)
        if weight.requires_grad and weight.ndim > 1 and not math.isclose(rate, expected):
            wrong.add(f"the learning rate of {name} is {rate:g} instead of {expected:g}")
    if wrong:
        raise _inactive(f"train.lora_plus_ratio: {ratio}", _first_of(wrong), "rates as chosen", _REPORT)


def check_moments(optimizer: torch.optim.Optimizer, model: nn.Module, chosen: Optimizer) -> None:
    """Check that the moments of large weights are stored as the chosen optimizer says: in 8 bits, paged, or both.

    transformers keeps the moments of embeddings in 32 bits.

    Args:
        optimizer: an optimizer that has taken a step.

    Raises:
        TrainingError: the moments of a weight are stored in a different form.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    wrong = set()
    for name, weight in model.named_parameters():
        moment = optimizer.state.get(weight, {}).get("state1")
        if moment is None:
            continue
        if chosen.is_8bit and weight.numel() >= _MIN_8BIT and id(weight) not in embeddings:
            wrong |= (
                {f"the moments of {name} are in {_name(moment.dtype)}"} if moment.dtype is not torch.uint8 else set()
            )
        if chosen.is_paged and weight.numel() >= _MIN_PAGED:
            wrong |= {f"the moments of {name} are not paged"} if not getattr(moment, "is_paged", False) else set()
    if wrong:
        todo = f"set train.optimizer to {Optimizer.ADAMW}, or install another release of bitsandbytes"
        raise _inactive(f"train.optimizer: {chosen}", _first_of(wrong), "moments as chosen", todo)


def _inactive(option: str, found: str, expected: str, todo: str) -> TrainingError:
    return TrainingError(f"{option} was chosen but is not active: {found}", expected=expected, todo=todo)


def _first_of(found: set[str]) -> str:
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return min(found) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
