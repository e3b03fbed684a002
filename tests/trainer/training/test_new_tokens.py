"""Tests tokens that are added to a base: their rows are trained, resumed and merged, and no other row changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import DataError, RecipeError, TrainingError
from tests.builders.new_tokens import EMBEDDING, TOKENS
from tests.builders.resumed_training import assert_same, train_in, train_until
from tests.builders.trainings import CLOSE, train
from tests.trainer.conftest import losses_of, make_example, make_model, make_recipe
from tests.trainer.uninterrupted import UninterruptedRuns
from trainer.base_model.find_base import folder_with_tokens
from trainer.evaluation.parity import adapter as adapter_parity
from trainer.export.merge import merge_adapter
from trainer.model.peft_config import load_adapter
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingData

BFLOAT16, _, FLOAT32 = NumberType


@pytest.fixture(scope="module")
def tied(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with_tokens(tiny_base, TOKENS, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    base = make_model(folder / "base", tie_word_embeddings=False)
    return folder_with_tokens(base, TOKENS, folder / "cache")


@pytest.fixture(scope="module")
def data() -> TrainingData:
    examples = [make_example(f"number {'x' * number}", f"<tool>{number % 3}</tool>") for number in range(12)]
    return TrainingData(examples, examples[:5])


@pytest.fixture(scope="module")
def examples(data: TrainingData) -> list[ChatExample]:
    return list(data.train)


def recipe(method: str = "lora", **sections: Any) -> Recipe:
    steps = {"batch_size": 4, "epochs": 4, "learning_rate": 3e-3 if method == "full" else 1e-2}
    adapter = {} if method == "full" else {"adapter": {"rank": 4}}
    content = {"method": method, "new_tokens": TOKENS, "train": steps, "checkpoints": {"every_steps": 1}}
    return make_recipe(**content | adapter | sections)


def test_new_token_gets_one_id_and_ids_of_ordinary_text_are_unchanged(tied: Path, tiny_base: Path) -> None:
    before, after = AutoTokenizer.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tied)
    text = "Say the colour <tool in one word, été."
    assert after(text).input_ids == before(text).input_ids
    assert after(f"a{TOKENS[0]}b").input_ids == [*before("a").input_ids, len(before), *before("b").input_ids]
    assert after.decode([len(before)], skip_special_tokens=True) == TOKENS[0]
    assert after.chat_template == before.chat_template


def test_new_token_embedding_is_initialized_to_the_mean_of_its_original_subword_embeddings(untied: Path) -> None:
    weights, tokenizer = load_file(untied / "model.safetensors"), AutoTokenizer.from_pretrained(untied)
    parts = tokenizer("<").input_ids + tokenizer("tool>").input_ids
    for name in (EMBEDDING, "lm_head.weight"):
        assert len(weights[name]) == len(tokenizer)
        mean = weights[name][parts].float().mean(dim=0).bfloat16()
        assert torch.equal(weights[name][tokenizer.convert_tokens_to_ids("<tool>")], mean)


def test_token_listed_as_new_is_rejected_if_the_tokenizer_already_has_it(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"new_tokens lists '<tool>', which the tokenizer already has"):
        folder_with_tokens(tied, ["<other>", "<tool>"], tmp_path)


def test_embedding_size_is_unchanged_when_spare_rows_suffice_for_new_tokens(tmp_path: Path) -> None:
    """Qwen's embeddings have more rows than its tokenizer has ids."""
    base = make_model(tmp_path / "base", vocab_size=320)
    changed = folder_with_tokens(base, TOKENS, tmp_path / "cache")
    assert len(load_file(changed / "model.safetensors")[EMBEDDING]) == 320
    assert json.loads((changed / "config.json").read_text("utf-8"))["vocab_size"] == 320


def test_new_tokens_can_be_added_to_a_base_folder_that_contains_no_weights(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for path in tiny_base.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "base" / path.name).symlink_to(path)
    changed = folder_with_tokens(tmp_path / "base", TOKENS, tmp_path / "cache")
    config, tokenizer = json.loads((changed / "config.json").read_text("utf-8")), AutoTokenizer.from_pretrained(changed)
    assert config["vocab_size"] == len(tokenizer)


def test_new_token_absent_from_all_examples_is_rejected_before_training(tied: Path, tmp_path: Path) -> None:
    data = TrainingData([make_example("a number", "<tool>1"), make_example("a number", "<tool>2")])
    with pytest.raises(DataError, match="the new token '</tool>' does not occur in the training examples"):
        train_in(FLOAT32, tied, data, recipe(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora", "dora"])
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_merging_keeps_trained_token_embeddings_and_matches_the_outputs_of_base_plus_adapter(
    method: str, base: str, data: TrainingData, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    summary = train_in(FLOAT32, folder, data, recipe(method), tmp_path)
    assert losses_of(summary)[-1] < losses_of(summary)[0] - 0.5
    merged = merge_adapter(folder, tmp_path / "trained", tmp_path / "merged")
    matrices = 1 if base == "tied" else 2
    assert merged.modules == 2 * 7 + 1 + 1
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(TOKENS))
    for name in (EMBEDDING, "lm_head.weight")[:matrices]:
        assert (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist() == ids
    prompt = torch.tensor([[5, *ids, 9, 12]])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        untrained = plain(prompt).logits
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        beside = load_adapter(plain, tmp_path / "trained")
        assert (written(prompt).logits - beside(prompt).logits).abs().max() < 0.1 * (
            written(prompt).logits - untrained
        ).abs().max()
        applied = adapter_parity.compare(beside, dict(written.state_dict()))
    assert applied.wrong is None
    assert applied.off < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "saved", "changed"),
    [
        ("tied", ["lm_head"], {EMBEDDING}),
        ("untied", ["embed_tokens", "lm_head"], {EMBEDDING, "lm_head.weight"}),
        ("untied", ["embed_tokens"], {EMBEDDING}),
    ],
)
def test_layers_listed_in_modules_to_save_are_trained_in_full_and_merged(
    base: str, saved: list[str], changed: set[str], data: TrainingData, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    chosen = recipe(new_tokens=[], adapter={"rank": 4, "modules_to_save": saved})
    train_in(FLOAT32, folder, data, chosen, tmp_path)
    merge_adapter(folder, tmp_path / "trained", tmp_path / "merged")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in differing if ".layers." not in name} == changed
    assert (before[EMBEDDING] != after[EMBEDDING]).any(dim=1).sum() > 20
    prompt = torch.arange(5, 40)[None]
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        beside = load_adapter(plain, tmp_path / "trained")
        assert torch.allclose(written(prompt).logits, beside(prompt).logits, atol=0.05)
        applied = adapter_parity.compare(beside, dict(written.state_dict()))
    assert (applied.wrong, applied.off < 0.01) == (None, True)


@pytest.mark.slow
def test_merge_fails_when_an_embedding_row_of_an_existing_token_changed(
    tied: Path, data: TrainingData, tmp_path: Path, monkeypatch: Any
) -> None:
    train_in(FLOAT32, tied, data, recipe(train={"steps": 2, "learning_rate": 1e-2}), tmp_path)
    config = tmp_path / "trained" / "adapter_config.json"
    content = json.loads(config.read_text("utf-8"))
    first, second = content["trainable_token_indices"]["model.embed_tokens"]
    monkeypatch.setattr("trainer.export.merge._all_rows", lambda *_: {EMBEDDING: [first], "lm_head.weight": [first]})
    with pytest.raises(TrainingError, match=rf"row {second} of .* but does not belong to a new token"):
        merge_adapter(tied, tmp_path / "trained", tmp_path / "merged")


@pytest.mark.slow
def test_full_fine_tuning_learns_new_tokens(tied: Path, data: TrainingData, tmp_path: Path) -> None:
    summary = train_in(FLOAT32, tied, data, recipe("full"), tmp_path)
    assert losses_of(summary)[-1] < losses_of(summary)[0] - 0.5


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_new_token_embeddings(
    tied: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = UninterruptedRuns(tied, data.train, tmp_path / "whole").run(recipe())
    train_until(tied, data, recipe(), tmp_path, 5, monkeypatch)
    assert_same(train_in(BFLOAT16, tied, data, recipe(), tmp_path), tmp_path, whole)


@pytest.mark.matrix
@pytest.mark.parametrize("sharded", [False, True])
def test_training_new_tokens_on_two_devices_gives_the_same_losses_as_on_one_device(
    sharded: bool, tied: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = train(tied, data, recipe(), tmp_path / "1", 1)
    both = train(tied, data, recipe(), tmp_path / "2", 2, sharded=sharded)
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=10 * CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"rank": 4, "init": "pissa"}, "train": {"batch_size": 4, "epochs": 4, "learning_rate": 5e-3}},
        {"train": {"batch_size": 4, "epochs": 4, "learning_rate": 5e-3, "lora_plus_ratio": 4}},
        {"train": {"batch_size": 4, "epochs": 8, "learning_rate": 1e-2, "packing": True, "max_length": 256}},
    ],
    ids=["pissa", "lora-plus", "packing"],
)
def test_new_tokens_can_be_combined_with_other_training_options(
    sections: dict[str, Any], untied: Path, data: TrainingData, tmp_path: Path
) -> None:
    summary = train_in(BFLOAT16, untied, data, recipe(**sections), tmp_path)
    assert losses_of(summary)[-1] < losses_of(summary)[0] - 0.5
    merge_adapter(untied, tmp_path / "trained", tmp_path / "merged")
