"""Tests that options which a library ignores stop a run, on real models, batches and optimizers."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, SiglipVisionConfig
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import TrainingError
from tests.trainer.conftest import make_recipe
from trainer.model import acceleration as acceleration_module
from trainer.model.acceleration import Acceleration, Attention, takes_liger_kernels
from trainer.model.load import ModelForm, load_model
from trainer.model.peft_config import add_adapter
from trainer.recipe.adapter import Quantization
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Optimizer
from trainer.training import arguments, sft
from trainer.training.mechanisms import (
    FirstStep,
    check_attention,
    check_checkpointing,
    check_liger,
    check_lora_plus,
    check_moments,
    check_nf4,
    check_number_types,
    check_optimizer_class,
    check_padding_free,
    checkpointed_layers,
)
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

PLAIN = Acceleration(Attention.SDPA, padding_free=False, liger_kernels=False, gradient_checkpointing=False)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16, attn_implementation="sdpa")


@pytest.fixture
def train(tiny_base: Path, examples: list[ChatExample], tmp_path: Path) -> Callable[..., TrainingSummary]:
    """Return a function that trains the tiny model for two steps in bfloat16."""

    def run(**train: Any) -> TrainingSummary:
        recipe = make_recipe(train={"batch_size": 4, "steps": 2, **train}, stopping={"curve": False})
        folders = tmp_path / "out", tmp_path / "checkpoints"
        return train_model(tiny_base, TrainingData(examples), recipe, *folders, number_type=NumberType.BFLOAT16)

    return run


def adapted(base: Path, recipe: Recipe, number_type: NumberType = NumberType.BFLOAT16) -> Any:
    return add_adapter(load_model(base, ModelForm(number_type, recipe.base_quantization)), recipe, 2)


@pytest.mark.slow
def test_run_stops_before_its_first_step_if_the_chosen_attention_is_not_active(
    train: Callable[..., TrainingSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded with PyTorch's attention although FlashAttention was chosen."""
    flash = replace(PLAIN, attention=Attention.FLASH_2)
    monkeypatch.setattr(sft, "choose_acceleration", lambda *args, **kwargs: flash)
    defaults = {**(sft.build_trainer.__kwdefaults__ or {}), "load": load_without_flash}
    monkeypatch.setattr(sft.build_trainer, "__kwdefaults__", defaults)
    with pytest.raises(
        TrainingError, match=r"flash_attention_2 was chosen but is not active: .*self_attn uses"
    ) as caught:
        train()
    assert "pip uninstall flash-attn" in caught.value.todo


def load_without_flash(base: Path, form: ModelForm) -> Any:
    return load_model(base, replace(form, attention=Attention.SDPA))


def test_eager_attention_is_an_error_unless_the_config_has_a_soft_cap(model: Any) -> None:
    check_attention(model, Attention.SDPA)
    model.set_attn_implementation("eager")
    with pytest.raises(TrainingError, match="sdpa was chosen but is not active"):
        check_attention(model, Attention.SDPA)
    model.config.attn_logit_softcapping = 50.0
    check_attention(model, Attention.SDPA)


def bind_liger(module: torch.nn.Module) -> None:
    """Replace a module's `forward` as liger_kernel.transformers.monkey_patch does with loaded models."""

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    module.__dict__["forward"] = MethodType(forward, module)


def test_liger_counts_as_active_only_when_it_patched_every_layer(model: Any) -> None:
    check_liger(model, chosen=False)
    with pytest.raises(TrainingError, match="2 of 2 layers have no Liger kernels") as caught:
        check_liger(model, chosen=True)
    assert "pip uninstall liger-kernel" in caught.value.todo
    bind_liger(model.model.layers[0].input_layernorm)
    with pytest.raises(TrainingError, match="1 of 2 layers have no Liger kernels"):
        check_liger(model, chosen=True)
    bind_liger(model.model.layers[1].input_layernorm)
    check_liger(model, chosen=True)
    with pytest.raises(TrainingError, match="2 of 2 layers have some Liger kernels"):
        check_liger(model, chosen=False)


@pytest.mark.parametrize(("kind", "takes"), [("llama", True), ("gpt_neox", False)])
def test_liger_is_chosen_only_for_model_types_that_it_supports(
    kind: str, takes: bool, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    vars(liger)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {kind: None}
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    assert takes_liger_kernels(tiny_base) is takes


def test_liger_is_not_imported_without_a_gpu(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(acceleration_module, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    assert not takes_liger_kernels(tiny_base)


def test_gradient_checkpointing_must_match_the_chosen_setting_in_every_layer(model: Any) -> None:
    check_checkpointing(model, chosen=False)
    with pytest.raises(TrainingError, match="checkpointing is off in 2 of 2 layers"):
        check_checkpointing(model, chosen=True)
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    with pytest.raises(TrainingError, match="checkpointing is off in 1 of 2 layers"):
        check_checkpointing(model, chosen=True)
    with pytest.raises(TrainingError, match="checkpointing is on in 1 of 2 layers") as caught:
        check_checkpointing(model, chosen=False)
    assert caught.value.todo == "set train.gradient_checkpointing to true"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_run_passes_all_checks_when_its_chosen_options_are_active(
    train: Callable[..., TrainingSummary], checkpointing: bool
) -> None:
    assert train(gradient_checkpointing=checkpointing).steps == 2


@pytest.mark.slow
def test_run_stops_after_its_first_step_if_checkpointed_layers_are_not_recomputed(
    train: Callable[..., TrainingSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", lambda function, *args, **kwargs: function(*args))
    with pytest.raises(TrainingError, match="the backward pass did not recompute the layers"):
        train(gradient_checkpointing=True)


def test_gradient_checkpointing_is_detected_in_a_model_with_an_image_encoder() -> None:
    text = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    images = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.train()
    model.gradient_checkpointing_enable()
    step = FirstStep(model, NumberType.FLOAT32, one_row=False)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    step.check(checkpointing=True)


@pytest.mark.slow
def test_run_stops_in_its_first_step_if_layers_compute_in_an_unexpected_dtype(
    train: Callable[..., TrainingSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "SFTConfig", lambda **options: SFTConfig(**options | {"bf16": False}))
    with pytest.raises(TrainingError, match=r"matrix products in bfloat16 .* a layer computes in float32"):
        train()


@pytest.mark.slow
def test_padding_free_batch_with_several_rows_is_an_error(
    train: Callable[..., TrainingSummary], monkeypatch: pytest.MonkeyPatch
) -> None:
    padding_free = replace(PLAIN, padding_free=True)
    monkeypatch.setattr(sft, "choose_acceleration", lambda *args, **kwargs: padding_free)
    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", padded)
    with pytest.raises(TrainingError, match="became a batch of shape"):
        train()
    monkeypatch.setattr("trainer.training.mechanisms.check_padding_free", lambda batch, rows: None)
    with pytest.raises(TrainingError, match="a layer got 4 rows"):
        train()


def padded(collator: DataCollatorForLanguageModeling, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate with padding, whatever the collator was told."""
    return real_torch_call(replace(collator, padding_free=False), examples)


real_torch_call = DataCollatorForLanguageModeling.torch_call


@pytest.mark.parametrize("packed", [False, True])
def test_padding_free_collator_concatenates_examples_into_one_row_and_marks_their_boundaries(packed: bool) -> None:
    lengths = {"seq_lengths": [2, 1]} if packed else {}
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], **lengths}] * 2
    check_padding_free(DataCollatorForLanguageModeling(0, padding_free=True).torch_call(rows), rows)
    with pytest.raises(TrainingError, match=r"2 rows with \d examples became a batch of shape \(2, 3\)"):
        check_padding_free(DataCollatorForLanguageModeling(0).torch_call(rows), rows)


def test_padding_free_batch_that_does_not_separate_its_examples_is_an_error() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1]}] * 2
    forgotten = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    batch = DataCollatorForLanguageModeling(0, padding_free=True).torch_call(forgotten)
    with pytest.raises(TrainingError, match=r"2 rows with 4 examples became a batch of shape .* with 2 example starts"):
        check_padding_free(batch, rows)


def test_trained_weight_in_bfloat16_raises_an_error(tiny_base: Path) -> None:
    model = adapted(tiny_base, make_recipe())
    check_number_types(model, NumberType.BFLOAT16)
    trained = next(weight for weight in model.parameters() if weight.requires_grad)
    trained.data = trained.data.bfloat16()
    with pytest.raises(TrainingError, match=r"trained weights in float32 was chosen .* is in bfloat16"):
        check_number_types(model, NumberType.BFLOAT16)


def test_frozen_layer_in_float32_is_an_error_unless_transformers_requires_float32(tiny_base: Path) -> None:
    model = adapted(tiny_base, make_recipe())
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight.data = layer.weight.data.float()
    with pytest.raises(TrainingError, match=r"frozen weights in bfloat16 .*up_proj is in float32"):
        check_number_types(model, NumberType.BFLOAT16)
    model.get_base_model()._keep_in_fp32_modules_strict = {"up_proj"}
    check_number_types(model, NumberType.BFLOAT16)


@pytest.mark.slow
@needs_bitsandbytes
def test_qlora_layers_not_stored_in_nf4_raise_an_error(tiny_base: Path) -> None:
    quantized = make_recipe(method="qlora")
    assert quantized.base_quantization is Quantization.NF4
    check_nf4(adapted(tiny_base, quantized), NumberType.BFLOAT16)
    with pytest.raises(TrainingError, match=r"is a Linear with weights in bfloat16, and 13 more"):
        check_nf4(adapted(tiny_base, make_recipe()), NumberType.BFLOAT16)
    with pytest.raises(TrainingError, match="computes in bfloat16"):
        check_nf4(adapted(tiny_base, quantized), NumberType.FLOAT32)


@pytest.mark.slow
@needs_bitsandbytes
def test_sharded_nf4_weights_pass_the_check_if_their_layers_have_nf4_state(tiny_base: Path) -> None:
    """Packed into floats, as other trainers divide them, some bytes would be NaN, which copies may change."""
    from bitsandbytes.nn.modules import Linear4bit

    model = adapted(tiny_base, make_recipe(method="qlora"))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    check_nf4(model, NumberType.BFLOAT16)
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.data.flatten().view(torch.bfloat16), requires_grad=False)
    with pytest.raises(TrainingError, match="with weights in bfloat16"):
        check_nf4(model, NumberType.BFLOAT16)


def optimizer_of(model: torch.nn.Module, **options: Any) -> Any:
    from bitsandbytes.optim.adamw import AdamW

    return AdamW(model.parameters(), lr=1e-3, **options)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_check_fails_if_the_fused_option_differs_from_the_chosen_value(fused: bool) -> None:
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), fused=fused)
    check_optimizer_class(optimizer, Optimizer.ADAMW, fused=fused)
    with pytest.raises(TrainingError, match=f"AdamW with fused={fused}"):
        check_optimizer_class(optimizer, Optimizer.ADAMW, fused=not fused)


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        (Optimizer.ADAMW_8BIT, {"optim_bits": 8}),
        (Optimizer.PAGED_ADAMW, {"is_paged": True}),
        (Optimizer.PAGED_ADAMW_8BIT, {"optim_bits": 8, "is_paged": True}),
    ],
)
def test_optimizer_check_fails_if_the_bit_width_or_paging_differs_from_the_recipe(
    chosen: Optimizer, options: dict[str, Any]
) -> None:
    layer = torch.nn.Linear(400, 400)
    check_optimizer_class(optimizer_of(layer, **options), chosen, fused=False)
    others = [torch.optim.AdamW(layer.parameters()), optimizer_of(layer)]
    for other in others:
        with pytest.raises(TrainingError, match=f"train.optimizer: {chosen} was chosen but is not active"):
            check_optimizer_class(other, chosen, fused=False)


@pytest.mark.slow
@needs_bitsandbytes
def test_8_bit_or_paged_optimizer_is_rejected_if_every_weight_is_too_small_for_it(
    train: Callable[..., TrainingSummary],
) -> None:
    """Every matrix of the tiny model's adapter has fewer than 4,096 weights, so its moments stay in float32."""
    with pytest.raises(
        TrainingError, match="no weight has 8-bit optimizer moments: the largest trained weight has 2,048"
    ) as caught:
        train(optimizer="adamw-8bit")
    assert caught.value.todo == "set train.optimizer to adamw"
    paged = optimizer_of(torch.nn.Linear(100, 100), is_paged=True)
    with pytest.raises(TrainingError, match="no weight has paged optimizer moments"):
        check_optimizer_class(paged, Optimizer.PAGED_ADAMW, fused=False)


@needs_bitsandbytes
def test_optimizer_moments_of_large_weights_other_than_embeddings_must_be_in_8_bits() -> None:
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(100, 64), "layer": torch.nn.Linear(64, 64)})
    optimizer = optimizer_of(model, optim_bits=8)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[model["embedding"].weight]
    state["state1"] = state["state1"].float()
    assert optimizer.state[model["layer"].bias]["state1"].dtype is torch.float32
    check_moments(optimizer, model, Optimizer.ADAMW_8BIT)
    state = optimizer.state[model["layer"].weight]
    state["state1"] = state["state1"].float()
    with pytest.raises(TrainingError, match=r"the moments of layer.weight are in float32"):
        check_moments(optimizer, model, Optimizer.ADAMW_8BIT)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_unpaged_moments_of_a_paged_optimizer_are_an_error() -> None:
    """On a CPU bitsandbytes pages nothing; it only warns."""
    model = torch.nn.Linear(400, 400)
    optimizer = optimizer_of(model, is_paged=True)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    with pytest.raises(TrainingError, match="the moments of weight are not paged"):
        check_moments(optimizer, model, Optimizer.PAGED_ADAMW)


def test_every_layer_of_a_model_is_included_in_the_checkpointing_check(model: Any) -> None:
    assert checkpointed_layers(model) == list(model.model.layers)


def test_unexpected_learning_rate_of_a_lora_plus_matrix_is_an_error() -> None:
    model = nn.ModuleDict({"layer": nn.ModuleDict({"lora_A": nn.Linear(2, 2), "lora_B": nn.Linear(2, 2)})})
    groups = [
        {"params": model["layer"][part].parameters(), "lr": rate} for part, rate in (("lora_A", 1), ("lora_B", 4))
    ]
    optimizer = torch.optim.AdamW(groups)
    check_lora_plus(optimizer, nn.ModuleDict({"base": model}), 1, 4)
    with pytest.raises(TrainingError, match=r"rate of base\.layer\.lora_B\.weight is 4 instead of 8"):
        check_lora_plus(optimizer, nn.ModuleDict({"base": model}), 1, 8)
    with pytest.raises(TrainingError, match=r"rate of base\.layer\.lora_B\.weight is 4 instead of 1"):
        check_lora_plus(optimizer, nn.ModuleDict({"base": model}), 1, None)
