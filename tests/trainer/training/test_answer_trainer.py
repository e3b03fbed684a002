"""Tests a step's loss on our path and TRL's: AdaLoRA's penalty counts once, and logits are the model's own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    InklingForCausalLM,
    InklingTextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    TrainerCallback,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.utils import add_fused_lm_head

from tests.trainer.conftest import make_tokenizer
from trainer.data.chat_template import IGNORED
from trainer.training.loss import AnswerTrainer, fused_head_is_right

TOKENIZER = make_tokenizer()
SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,  # logits so large that a scale or a cap shows in the loss
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.01}
ROWS = [
    {"input_ids": list(range(10 + row, 22 + row)), "labels": [IGNORED] * 6 + list(range(16 + row, 22 + row))}
    for row in range(6)
]


class Gradients(TrainerCallback):
    """Records the gradients of the optimizer's first step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.kept = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def make_trainer(model: PreTrainedModel | PeftModel, out: Path, *, accumulation: int = 1) -> AnswerTrainer:
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=1,
        per_device_train_batch_size=len(ROWS) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return AnswerTrainer(model, arguments, train_dataset=Dataset.from_list(ROWS), processing_class=TOKENIZER)


def adalora(model: PreTrainedModel, weight: float) -> PeftModel:
    set_seed(0)
    config = AdaLoraConfig(
        target_modules=["q_proj", "v_proj"], total_step=10, task_type="CAUSAL_LM", orth_reg_weight=weight
    )
    return get_peft_model(copy.deepcopy(model), config)


def penalty_gradients(model: PeftModel, weight: float) -> dict[str, torch.Tensor]:
    """Return the gradients of AdaLoRA's formula (Zhang et al. 2023, eq. 4), averaged over factors as in PEFT."""
    factors = {name: factor for name, factor in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    norms = []
    for name, factor in factors.items():
        square = factor @ factor.T if "lora_A" in name else factor.T @ factor
        norms.append(torch.linalg.norm(square - torch.eye(len(square))))
    penalty = weight * torch.stack(norms).mean()
    return dict(zip(factors, torch.autograd.grad(penalty, list(factors.values())), strict=True))


LLAMA = LlamaForCausalLM(LlamaConfig(**SHAPE))
MIXTURE = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "trls", "accumulation"),
    [(LLAMA, False, 1), (LLAMA, False, 3), (LLAMA, True, 3), (MIXTURE, True, 1)],
    ids=["ours", "ours, accumulated", "TRL's, accumulated", "mixture of experts"],
)
def test_adalora_penalty_is_counted_once_per_step(
    model: PreTrainedModel, trls: bool, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_of = []
    for weight in (0.5, 0.0):
        trainer = make_trainer(adalora(model, weight), tmp_path, accumulation=accumulation)
        if trls:
            monkeypatch.setattr(trainer, "_scores_answers", False)
        assert trainer._scores_answers is not trls
        expected = penalty_gradients(trainer.model, 0.5)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        gradients_of.append(gradients.kept)
    with_penalty, without = gradients_of
    for name, gradient in expected.items():
        torch.testing.assert_close(with_penalty[name] - without[name], gradient, rtol=1e-3, atol=1e-5)


SCALED = {
    "capped logits": Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=2.0)),
    "scaled logits": CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3)),
    "divided logits": GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)),
    "divided logits of a mixture": GraniteMoeForCausalLM(
        GraniteMoeConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, logits_scaling=3.0)
    ),
}


@pytest.mark.parametrize("model", SCALED.values(), ids=SCALED)
def test_loss_computed_by_trl_equals_the_cross_entropy_of_the_model_logits(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    monkeypatch.setattr(trainer, "_scores_answers", False)
    monkeypatch.setattr(trainer, "router_aux_loss_coef", 0.0)
    batch = trainer.data_collator(ROWS)
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_mixture_of_experts_architecture_with_zero_experts_is_trained_without_auxiliary_loss(tmp_path: Path) -> None:
    dense = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(**SHAPE, num_local_experts=0, layer_types=["attention"] * 2, mamba_n_heads=4)
    )
    trainer = make_trainer(dense, tmp_path)
    assert trainer._scores_answers
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("model", [LLAMA, MIXTURE, *SCALED.values()], ids=["plain", "mixture", *SCALED])
def test_fused_trl_head_is_used_when_its_outputs_are_correct(model: PreTrainedModel) -> None:
    model = copy.deepcopy(model)
    add_fused_lm_head(model)
    assert fused_head_is_right(model)


WRONG = {
    "a cap that TRL does not know": RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SHAPE, logits_soft_cap=30.0)),
    "hidden states that are scaled": InklingForCausalLM(InklingTextConfig(**SHAPE, logits_mup_width_multiplier=4.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "number_type"), zip(WRONG.values(), [torch.float32, torch.bfloat16], strict=True), ids=WRONG
)
def test_fused_trl_head_is_not_used_when_its_outputs_are_wrong(
    model: PreTrainedModel, number_type: torch.dtype
) -> None:
    model = copy.deepcopy(model).to(number_type)
    add_fused_lm_head(model)
    assert not fused_head_is_right(model)
