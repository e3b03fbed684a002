"""Tests new tokens with preferences: their rows are trained, merged and resumed as with reference answers."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from svc.dataset.schema.objective import Objective
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.engine.device import NumberType
from svc.errors import DataError
from tests.builders.new_tokens import EMBEDDING, TOKENS
from tests.builders.preferences import recipe_of
from tests.builders.resumed_training import train_in, train_until
from tests.builders.trainings import CLOSE, CLOSE_WEIGHTS, difference, train, weights
from tests.trainer.conftest import losses_of, make_example, make_model
from tests.trainer.without_clock import without_clock
from trainer.base_model.find_base import folder_with_tokens
from trainer.export.merge import merge_adapter
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingData

pytestmark = pytest.mark.slow

DPO, ORPO, KTO = Objective.DPO, Objective.ORPO, Objective.KTO
FLOAT32 = NumberType.FLOAT32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose output head is its embedding."""
    folder = tmp_path_factory.mktemp("bases")
    return folder_with_tokens(make_model(folder / "base", tie_word_embeddings=True), TOKENS, folder / "cache")


def data_for(objective: Objective) -> TrainingData:
    """Return answers in the new tokens, which are better than answers without and with another number."""
    pairs = []
    for number in range(12):
        prompt, worse = f"number {'x' * number}", f"<tool>{(number + 1) % 3}</tool>"
        chosen = make_example(prompt, f"<tool>{number % 3}</tool>")
        pairs.append(PreferencePair(chosen, make_example(prompt, worse if number % 2 else "none")))
    judged: list[Any] = [*pairs]
    if objective is KTO:
        judged = [LabeledAnswer(pair.chosen, desirable=True) for pair in pairs]
        judged += [LabeledAnswer(pair.rejected, desirable=False) for pair in pairs]
    return TrainingData((), preferences=judged, heldout_preferences=judged[:5])


def recipe(objective: Objective, method: Method = Method.LORA, **sections: Any) -> Recipe:
    steps = {"batch_size": 4, "epochs": 3, "learning_rate": 1e-2}
    return recipe_of(objective, method, **{"new_tokens": TOKENS, "train": steps} | sections)


@pytest.mark.parametrize(
    ("objective", "method"),
    [
        (DPO, Method.LORA),
        (ORPO, Method.LORA),
        (KTO, Method.LORA),
        pytest.param(DPO, Method.QLORA, marks=pytest.mark.matrix),
        pytest.param(KTO, Method.DORA, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_embeddings_of_new_tokens_are_trained_on_preference_data_and_saved_in_the_merged_model(
    objective: Objective, method: Method, base: Path, tmp_path: Path
) -> None:
    summary = train_in(FLOAT32, base, data_for(objective), recipe(objective, method), tmp_path)
    assert losses_of(summary)[-1] < losses_of(summary)[0] - 0.05
    merge_adapter(base, tmp_path / "trained", tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(list(TOKENS))
    assert (before[EMBEDDING] != after[EMBEDDING]).any(dim=1).nonzero().flatten().tolist() == ids


@pytest.mark.parametrize("objective", [DPO, pytest.param(KTO, marks=pytest.mark.matrix)], ids=str)
def test_killed_and_resumed_preference_run_ends_with_the_same_new_token_embeddings(
    objective: Objective, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_for(objective)
    whole = train_in(FLOAT32, base, data, recipe(objective), tmp_path / "whole")
    train_until(base, data, recipe(objective), tmp_path / "killed", 5, monkeypatch, FLOAT32)
    resumed = train_in(FLOAT32, base, data, recipe(objective), tmp_path / "killed")
    assert without_clock(resumed) == without_clock(whole)
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_new_token_absent_from_all_preference_answers_is_rejected_before_training(base: Path, tmp_path: Path) -> None:
    pairs = [PreferencePair(make_example("a number", "<tool>1"), make_example("a number", "<tool>2"))]
    with pytest.raises(DataError, match="the new token '</tool>' does not occur in the training examples"):
        train_in(FLOAT32, base, TrainingData((), preferences=pairs), recipe(DPO), tmp_path)


@pytest.mark.matrix
def test_sharded_preference_training_of_new_tokens_on_two_devices_matches_one_device(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changed = recipe(DPO, train={"batch_size": 4, "epochs": 2, "learning_rate": 1e-3})
    one = train(base, data_for(DPO), changed, tmp_path / "1", 1)
    two = train(base, data_for(DPO), changed, tmp_path / "2", 2, sharded=True)
    assert losses_of(two) == pytest.approx(losses_of(one), abs=10 * CLOSE)
    assert difference(tmp_path / "1", tmp_path / "2") < CLOSE_WEIGHTS
