"""Runs one short training of a base model and its merge without an engine, and checks the merged folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.device import NumberType
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings

if TYPE_CHECKING:
    import torch

# Without a system turn: the templates of Gemma 2 and Mistral reject it.
EXAMPLES = [
    ChatExample((Message(Role.USER, f"Which section has package {word}?"), Message(Role.ASSISTANT, answer)))
    for word, answer in (("lxde", "x11"), ("sox", "sound"), ("curl", "net"), ("numpy", "python"))
]


def train_and_merge(base: Path, folder: Path) -> Path:
    """Check a base, train LoRA on it for two steps, and return the folder of the merged model."""
    from svc.engine.device import read_capabilities
    from trainer.base_model.checks import check_folder
    from trainer.export.merge import merge_adapter
    from trainer.pipeline.preflight import check_base
    from trainer.recipe.recipe import Recipe
    from trainer.training.sft import train_model
    from trainer.training.summary import TrainingData

    recipe = Recipe.model_validate(
        {
            "name": "family",
            "base": str(base),
            "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
            "train": {"batch_size": 2, "steps": 2, "learning_rate": 0.01},
            "formats": ["adapter"],
        }
    )
    check_folder(base)
    check_base(base, recipe, read_capabilities(Settings().home), EngineSettings())
    train_model(
        base,
        TrainingData(EXAMPLES),
        recipe,
        folder / "adapter",
        folder / "checkpoints",
        number_type=NumberType.BFLOAT16,
    )
    merge_adapter(base, folder / "adapter", folder / "merged")
    return folder / "merged"


def check_merged(base: Path, merged: Path) -> None:
    """Fail unless a merged model has its base's files and config, and answers differently from the base."""
    import torch

    from trainer.evaluation.parity.files import other_config, other_files

    assert other_files(base, merged) == []
    assert other_config(base, merged) == []
    before, after = _logits(base), _logits(merged)
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


def _logits(folder: Path) -> "torch.Tensor":
    """Return the logits that follow the first example's prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    from svc.model_folder.chat_template import choose_template_kwargs
    from trainer.data.chat_template import tokenize_as_trained

    (row,) = tokenize_as_trained(folder, EXAMPLES[:1], choose_template_kwargs(folder, None))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([row.input_ids])).logits
    return logits
