"""Tests preference tuning: losses equal TRL's, only answers score, and interrupted runs end with the same weights."""

import json
import math
import os
import signal
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback, set_seed
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.engine.device import NumberType
from svc.errors import DataError, InterruptedRunError
from tests.builders.mixtures import SHAPE
from tests.builders.preferences import LABELED, PAIRS, data_for, recipe_of
from tests.builders.resumed_training import Killed
from tests.builders.trainings import weights
from tests.trainer.conftest import losses_of, make_example, make_tokenizer
from tests.trainer.without_clock import without_clock
from trainer.callbacks.preemption import Preemption
from trainer.data.chat_template import load_tokenizer, stop_tokens
from trainer.data.comparison import Comparison, tokenize_preferences
from trainer.model.load import ModelForm, load_model
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training import trainer as trainer_module
from trainer.training.assembly import TrainerSetup
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.preference import PreferenceTrainer, build_preference_trainer
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

pytestmark = pytest.mark.slow

FLOAT32 = NumberType.FLOAT32


def train(base: Path, recipe: Recipe, folder: Path, number_type: NumberType = FLOAT32) -> TrainingSummary:
    data, out, checkpoints = data_for(recipe.objective), folder / "trained", folder / "checkpoints"
    return train_model(base, data, recipe, out, checkpoints, number_type=number_type)


def comparisons_of(base: Path, judged: list[Any], recipe: Recipe) -> list[Comparison]:
    tokenizer = load_tokenizer(base)
    return tokenize_preferences(tokenizer, judged, stop_tokens(base, tokenizer), {}, recipe.train)


def trainer_of(base: Path, judged: list[Any], recipe: Recipe, folder: Path) -> PreferenceTrainer:
    comparisons, checkpoints = comparisons_of(base, judged, recipe), CheckpointFolder(folder / "checkpoints", 1)
    tokenizer = load_tokenizer(base)
    setup = TrainerSetup(base, tokenizer, recipe, folder, checkpoints, None, Preemption(), FLOAT32)
    trainer = build_preference_trainer(setup, comparisons, [])
    assert isinstance(trainer, PreferenceTrainer)
    return trainer


def changed_loss(trainer: PreferenceTrainer) -> float:
    """Return the loss on all rows as one batch, after the adapter was changed as if by training."""
    trainer.prepare_run()
    change_adapter(trainer.model)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def change_adapter(model: torch.nn.Module) -> None:
    """Set the adapter's weights, the same for every copy of a model."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0].replace(".default", "")):
        if "lora_" in name and ".ref." not in name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def trl_options(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": rows,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": None,
    }


def trl_texts(base: Path, pair: PreferencePair) -> dict[str, str]:
    """Return a pair as texts, whose tokens TRL joins without changes."""
    tokenizer = load_tokenizer(base)
    prompt = [turn.templated() for turn in pair.chosen.prompt]
    return {
        "prompt": str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)),
        "chosen": pair.chosen.answer + str(tokenizer.eos_token),
        "rejected": pair.rejected.answer + str(tokenizer.eos_token),
    }


def trl_model(base: Path) -> Any:
    return load_model(base, ModelForm(FLOAT32))


def trl_loss(trainer: Any) -> float:
    change_adapter(trainer.model)
    trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"beta": 0.5}, {"beta": 0.5}),
        ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
        ({"loss": "robust", "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ],
)
def test_dpo_loss_equals_the_loss_of_the_trl_trainer(
    ours: dict[str, Any], theirs: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    loss = changed_loss(trainer_of(tiny_base, PAIRS, recipe_of(Objective.DPO, preference=ours), tmp_path))
    config = DPOConfig(precompute_ref_log_probs=True, **trl_options(tmp_path, len(PAIRS)), **theirs)
    rows = Dataset.from_list([trl_texts(tiny_base, pair) for pair in PAIRS])
    trl = DPOTrainer(
        trl_model(tiny_base),
        args=config,
        train_dataset=rows,
        processing_class=load_tokenizer(tiny_base),
        peft_config=LORA,
    )
    assert loss == pytest.approx(trl_loss(trl), rel=1e-5)


def test_dpo_loss_of_a_mixture_of_experts_includes_the_same_balancing_loss_as_trl(tmp_path: Path) -> None:
    set_seed(0)
    config = Qwen3MoeConfig(**SHAPE, num_experts=4, router_aux_loss_coef=0.5)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    changed = recipe_of(Objective.DPO, adapter={"rank": 4, "targets": "attention"})
    trainer = trainer_of(tmp_path / "base", PAIRS, changed, tmp_path)
    loss = changed_loss(trainer)
    options = DPOConfig(precompute_ref_log_probs=True, **trl_options(tmp_path, len(PAIRS)))
    rows = Dataset.from_list([trl_texts(tmp_path / "base", pair) for pair in PAIRS])
    trl = DPOTrainer(
        trl_model(tmp_path / "base"),
        args=options,
        train_dataset=rows,
        processing_class=load_tokenizer(tmp_path / "base"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    assert loss == pytest.approx(trl_loss(trl), rel=1e-5)
    trainer.aux_loss_enabled = False
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    with torch.no_grad():
        assert loss > float(trainer.compute_loss(trainer.model, batch)) + 0.4


def test_kto_loss_equals_the_loss_of_the_trl_trainer(tiny_base: Path, tmp_path: Path) -> None:
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    loss = changed_loss(trainer_of(tiny_base, LABELED, recipe_of(Objective.KTO, preference=weights), tmp_path))
    config = KTOConfig(precompute_ref_log_probs=True, **trl_options(tmp_path, len(LABELED)), **weights)
    rows: list[dict[str, Any]] = []
    for answer in LABELED:
        texts = trl_texts(tiny_base, PreferencePair(answer.example, answer.example))
        rows.append({"prompt": texts["prompt"], "completion": texts["chosen"], "label": answer.desirable})
    tokenizer = load_tokenizer(tiny_base)
    parts: dict[str, Any] = {"args": config, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trl = KTOTrainer(trl_model(tiny_base), peft_config=LORA, **parts)
    assert loss == pytest.approx(trl_loss(trl), rel=1e-5)


def test_orpo_loss_equals_the_trl_loss_computed_over_answer_tokens_only(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    trainer = trainer_of(tiny_base, PAIRS, recipe_of(Objective.ORPO, preference={"beta": 0.3}), tmp_path)
    loss = changed_loss(trainer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"]).logits
    logprobs = ORPOTrainer.get_batch_logps(logits, batch["labels"], average_log_prob=True)
    chosen, rejected = logprobs.split(len(PAIRS))
    trl = SimpleNamespace(beta=0.3, accelerator=trainer.accelerator)
    ratios = ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)[0]
    assert loss == pytest.approx(float(-chosen.mean() - ratios.mean()), rel=1e-5)


def train_until(base: Path, recipe: Recipe, folder: Path, step: int, monkeypatch: Any, number_type: NumberType) -> None:
    """Train, and interrupt after the given step, before its checkpoint is written."""

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Killed

    original = trainer_module.ResumableTrainer.__init__

    def with_kill(self: Any, **options: Any) -> None:
        original(self, **options)
        self.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.ResumableTrainer, "__init__", with_kill)
        with pytest.raises(Killed):
            train(base, recipe, folder, number_type)


@pytest.mark.parametrize(
    ("objective", "method", "number_type"),
    [
        (Objective.DPO, Method.LORA, NumberType.BFLOAT16),
        pytest.param(Objective.DPO, Method.FULL, FLOAT32, marks=pytest.mark.matrix),
        pytest.param(Objective.DPO, Method.QLORA, FLOAT32, marks=pytest.mark.matrix),
        pytest.param(Objective.DPO, Method.ADALORA, FLOAT32, marks=pytest.mark.matrix),
        (Objective.ORPO, Method.FULL, FLOAT32),
        (Objective.KTO, Method.DORA, FLOAT32),
    ],
)
def test_resumed_preference_run_matches_an_uninterrupted_run(
    objective: Objective,
    method: Method,
    number_type: NumberType,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(objective, method, stopping={"every_steps": 2})
    whole = train(tiny_base, recipe, tmp_path / "a", number_type)
    for step in (2, 5):
        train_until(tiny_base, recipe, tmp_path / "b", step, monkeypatch, number_type)
    resumed = train(tiny_base, recipe, tmp_path / "b", number_type)
    assert without_clock(resumed) == without_clock(whole)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def test_resumed_preference_run_does_not_rescore_the_answers(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, scoring = recipe_of(Objective.DPO), "Scoring the answers with the model before training"
    train_until(tiny_base, recipe, tmp_path, 3, monkeypatch, FLOAT32)
    assert scoring in capsys.readouterr().err
    train(tiny_base, recipe, tmp_path)
    assert scoring not in capsys.readouterr().err


def test_training_resumes_from_a_checkpoint_after_an_interruption_during_a_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(Objective.DPO, checkpoints={"every_steps": None})
    train(tiny_base, recipe, tmp_path / "a")
    original = PreferenceTrainer.compute_loss

    def signal_in_step_four(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "compute_loss", signal_in_step_four)
        with pytest.raises(InterruptedRunError, match="SIGTERM after step 3 of 8"):
            train(tiny_base, recipe, tmp_path / "b")
    train(tiny_base, recipe, tmp_path / "b")
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


def test_signal_while_answers_are_scored_interrupts_the_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signal_first(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("trainer.training.preference.answer_logprobs", signal_first)
    with pytest.raises(InterruptedRunError, match="SIGTERM before the first step"):
        train(tiny_base, recipe_of(Objective.DPO), tmp_path)


@pytest.mark.parametrize("objective", [Objective.DPO, Objective.KTO])
def test_preference_loss_before_the_first_step_equals_the_loss_of_a_model_with_no_preference(
    objective: Objective, tiny_base: Path, tmp_path: Path
) -> None:
    summary = train(tiny_base, recipe_of(objective, stopping={"every_steps": 2}), tmp_path)
    start = math.log(2) if objective is Objective.DPO else 0.5
    assert summary.points[0].heldout_loss == pytest.approx(start, abs=1e-4)
    assert losses_of(summary)[0] == pytest.approx(start, abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        *((Objective.DPO, method) for method in (Method.LORA, Method.FULL)),
        *(
            pytest.param(Objective.DPO, method, marks=pytest.mark.matrix)
            for method in Method
            if method not in (Method.LORA, Method.FULL)
        ),
        (Objective.ORPO, Method.LORA),
        (Objective.KTO, Method.QLORA),
    ],
)
def test_preference_is_learned_with_every_method_and_objective(
    objective: Objective, method: Method, tiny_base: Path, tmp_path: Path
) -> None:
    """Every pair prefers the answer "red" to "blue"."""
    judged: list[Any] = []
    for number in range(12):
        red, blue = (make_example(f"number {'x' * number}", colour) for colour in ("red", "blue"))
        one = LabeledAnswer(red, desirable=True) if number % 2 else LabeledAnswer(blue, desirable=False)
        judged.append(one if objective is Objective.KTO else PreferencePair(red, blue))
    rate = {Method.FULL: 1e-3, Method.VERA: 0.1}.get(method, 2e-2)
    recipe = recipe_of(objective, method, train={"epochs": 8, "learning_rate": rate})
    data, out = TrainingData((), preferences=judged), tmp_path / "trained"
    summary = train_model(tiny_base, data, recipe, out, tmp_path / "checkpoints", number_type=FLOAT32)
    losses = losses_of(summary)
    assert fmean(losses[-4:]) < 0.9 * fmean(losses[:4])


@pytest.mark.parametrize("objective", [Objective.DPO, Objective.ORPO])
def test_halving_the_batch_and_doubling_the_accumulation_gives_the_same_losses(
    objective: Objective, tiny_base: Path, tmp_path: Path
) -> None:
    """Twelve pairs in batches of 8, so that the last step has an incomplete batch."""
    whole = {"batch_size": 8, "epochs": 2, "learning_rate": 1e-3}
    half = whole | {"batch_size": 4, "gradient_accumulation": 2}
    curves = [
        losses_of(train(tiny_base, recipe_of(objective, train=section), tmp_path / name))
        for name, section in (("a", whole), ("b", half))
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_prompt_tokens_are_not_scored_in_preference_training(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    for comparison, pair in zip(comparisons_of(tiny_base, list(PAIRS), recipe_of(Objective.DPO)), PAIRS, strict=True):
        assert comparison.first.prompt == comparison.second.prompt
        for row, example in ((comparison.first, pair.chosen), (comparison.second, pair.rejected)):
            assert tokenizer.decode(row.answer) == example.answer + str(tokenizer.eos_token)


def test_kto_compares_each_labeled_answer_with_an_answer_to_a_different_prompt(tiny_base: Path) -> None:
    twice = [answer for answer in LABELED for _ in range(2)]
    for comparison in comparisons_of(tiny_base, twice, recipe_of(Objective.KTO)):
        assert comparison.second.prompt == comparison.first.prompt
        assert comparison.second.answer in {
            row.first.answer
            for row in comparisons_of(tiny_base, twice, recipe_of(Objective.KTO))
            if row.first.prompt != comparison.first.prompt
        }


def test_labeled_answers_to_a_single_prompt_are_rejected(tiny_base: Path) -> None:
    answers = [LabeledAnswer(PAIRS[0].chosen, True), LabeledAnswer(PAIRS[0].rejected, False)]
    with pytest.raises(DataError, match="the same prompt"):
        comparisons_of(tiny_base, answers, recipe_of(Objective.KTO))


def test_pair_is_dropped_when_either_answer_is_too_long(tiny_base: Path) -> None:
    pairs = [*PAIRS[:3], PreferencePair(PAIRS[3].chosen, make_example("number xxx", "red" * 500))]
    recipe = recipe_of(Objective.DPO, train={"too_long": "drop"})
    assert len(comparisons_of(tiny_base, pairs, recipe)) == 3


def test_heldout_pairs_longer_than_the_training_limit_are_still_evaluated(tiny_base: Path) -> None:
    tokenizer, long = load_tokenizer(tiny_base), PreferencePair(make_example("n", "red" * 500), make_example("n", "b"))
    assert len(tokenize_preferences(tokenizer, [long], stop_tokens(tiny_base, tokenizer), {})) == 1


def test_weights_with_the_lowest_heldout_preference_loss_are_kept(tiny_base: Path, tmp_path: Path) -> None:
    recipe = recipe_of(Objective.DPO, stopping={"every_steps": 1, "keep_best": True})
    summary = train(tiny_base, recipe, tmp_path)
    measured = {point.step: point.heldout_loss for point in summary.points if point.step and point.heldout_loss}
    assert summary.best_step == min(measured, key=lambda step: measured[step])


def test_saved_adapter_does_not_contain_the_reference_adapter(tiny_base: Path, tmp_path: Path) -> None:
    train(tiny_base, recipe_of(Objective.DPO), tmp_path)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text("utf-8"))
    assert config["peft_type"] == "LORA"
    assert not [path for path in (tmp_path / "trained").iterdir() if path.is_dir()]
    assert load_file(tmp_path / "trained" / "adapter_model.safetensors")
