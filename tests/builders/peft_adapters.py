"""Builds adapters with PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.conftest import make_recipe
from trainer.model.experts import name_experts
from trainer.model.peft_config import add_adapter


def random_adapter(base: Path, folder: Path, targets: str | list[str] = "all-linear") -> Path:
    """Return an adapter that changes each of these linear layers."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def recipe_adapter(base: Path, folder: Path, **sections: Any) -> Path:
    """Write an adapter, trained with a recipe's method, that changes every module it targets."""
    torch.manual_seed(1)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    name_experts(loaded.config)
    model = add_adapter(loaded, make_recipe(**sections), steps=20)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight) * (weight.abs().mean() + 0.1))
    model.save_pretrained(folder)
    return folder


def train_with_peft(base: Path, folder: Path, *, tokens: torch.Tensor | None = None, **options: Any) -> Path:
    """Train an adapter for three steps with PEFT and torch alone, and return its folder."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
        ),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    tokens = torch.arange(5, 45).reshape(2, 20) if tokens is None else tokens
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
