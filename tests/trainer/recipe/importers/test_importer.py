"""Tests the import of configs that Axolotl and LLaMA-Factory publish as examples (tests/data/recipes)."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from svc.cli import group
from svc.errors import RecipeError
from trainer.recipe.file import load_recipe
from trainer.recipe.importers.draft import Effect
from trainer.recipe.importers.importer import ImportedRecipe, import_recipe

EXAMPLES = Path(__file__).parents[3] / "data" / "recipes"
AXOLOTL = sorted((EXAMPLES / "axolotl").iterdir())
LLAMA_FACTORY = sorted((EXAMPLES / "llama_factory" / "examples").iterdir())


def imported(tmp_path: Path, **content: Any) -> ImportedRecipe:
    """Import a config of Axolotl with the given keys besides the necessary ones."""
    config = tmp_path / "Config 1.yml"
    necessary = {"base_model": "org/base", "datasets": [{"path": "org/data", "type": "chat_template"}]}
    config.write_text(yaml.safe_dump(necessary | content))
    return import_recipe(config, tmp_path)


def imported_from_llama_factory(tmp_path: Path, **content: Any) -> dict[str, Any]:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model_name_or_path": "org/base", "dataset": "own"} | content))
    return import_recipe(config, tmp_path).content


def left_out(result: ImportedRecipe) -> set[str]:
    return {note.key for note in result.notes if note.effect is Effect.LEFT_OUT}


@pytest.mark.parametrize("example", [*AXOLOTL, *LLAMA_FACTORY], ids=lambda path: path.stem)
def test_recipe_imported_from_a_published_example_is_accepted_by_the_trainer(example: Path, tmp_path: Path) -> None:
    result = import_recipe(example, tmp_path)
    assert result.refused is None
    (tmp_path / "recipe.yaml").write_text(result.text())
    load_recipe(tmp_path / "recipe.yaml")


def test_slice_of_a_split_other_than_train_is_imported_as_a_limit_with_a_note(tmp_path: Path) -> None:
    dataset = {"path": "org/data", "type": "chat_template", "split": "test[:100]"}
    result = imported(tmp_path, datasets=[dataset])
    assert result.content["data"]["limit"] == 100
    assert "datasets[0].split" in left_out(result)


def test_imported_axolotl_lora_example_keeps_its_hyperparameters(tmp_path: Path) -> None:
    content = import_recipe(EXAMPLES / "axolotl" / "lora-1b.yml", tmp_path).content
    assert content["base"] == "NousResearch/Llama-3.2-1B"
    assert content["method"] == "lora"
    assert content["data"] == {"train": ["hf:teknium/GPT4-LLM-Cleaned"], "heldout_share": 0.1}
    assert content["adapter"] == {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": "all-linear"}
    train = content["train"]
    assert (train["optimizer"], train["learning_rate"], train["schedule"]) == ("adamw-8bit", 0.0002, "cosine")
    assert (train["batch_size"], train["gradient_accumulation"], train["warmup_ratio"]) == (2, 2, 0.1)
    assert (train["max_length"], train["too_long"], train["packing"]) == (2048, "drop", True)


def test_axolotl_completion_datasets_are_imported_as_raw_text(tmp_path: Path) -> None:
    datasets = [
        {"path": "org/books", "type": "completion", "field": "text"},
        {"path": "org/more", "type": "completion"},
    ]
    result = imported(tmp_path, datasets=datasets, sequence_len=1024, sample_packing=True, chat_template="chatml")
    assert (result.refused, left_out(result)) == (None, set())
    assert result.content["objective"] == "text"
    assert result.content["train"]["max_length"] == 1024
    assert "chat_template" not in result.content
    mixed = [*datasets, {"path": "org/chats", "type": "chat_template"}]
    assert "datasets[0].type" in left_out(imported(tmp_path, datasets=mixed))


def test_llama_factory_pretraining_is_imported_as_raw_text_training(tmp_path: Path) -> None:
    content = imported_from_llama_factory(tmp_path, stage="pt", cutoff_len=512)
    assert content["objective"] == "text"
    assert (content["train"]["packing"], content["train"]["max_length"]) == (True, 512)
    assert "too_long" not in content["train"]


def test_imported_llama_factory_dpo_example_keeps_its_hyperparameters_and_data_path(tmp_path: Path) -> None:
    example = EXAMPLES / "llama_factory" / "examples" / "train_lora-qwen3_lora_dpo.yaml"
    content = import_recipe(example, tmp_path).content
    assert (content["objective"], content["preference"]) == ("dpo", {"loss": "sigmoid", "beta": 0.1})
    assert content["data"]["train"] == [str(EXAMPLES / "llama_factory" / "data" / "dpo_en_demo.json")]
    assert (content["adapter"]["rank"], content["train"]["learning_rate"], content["train"]["epochs"]) == (8, 5e-6, 3)


def test_defaults_of_the_source_tool_are_written_if_they_differ_from_tuneserve_defaults(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{model_name_or_path: org/base, dataset: mine}")
    content = import_recipe(config, tmp_path).content
    assert content["adapter"]["rank"] == 8
    train = content["train"]
    assert (train["epochs"], train["batch_size"], train["learning_rate"], train["max_length"]) == (3, 8, 5e-5, 2048)


@pytest.mark.parametrize(
    ("warmup", "ratio"), [({}, 0.03), ({"warmup_steps": 0}, 0), ({"warmup_steps": 0, "warmup_ratio": 0.1}, 0)]
)
def test_zero_warmup_steps_in_axolotl_disable_the_warmup(warmup: dict[str, Any], ratio: float, tmp_path: Path) -> None:
    assert imported(tmp_path, **warmup).content["train"]["warmup_ratio"] == ratio


def test_llama_factory_warmup_ratio_is_used_if_warmup_steps_is_zero(tmp_path: Path) -> None:
    content = imported_from_llama_factory(tmp_path, warmup_steps=0, warmup_ratio=0.1)
    assert content["train"]["warmup_ratio"] == 0.1


def test_llama_factory_neat_packing_is_imported_as_packing(tmp_path: Path) -> None:
    assert imported_from_llama_factory(tmp_path, neat_packing=True)["train"]["packing"] is True


def test_llama_factory_lora_target_may_be_a_list(tmp_path: Path) -> None:
    content = imported_from_llama_factory(tmp_path, lora_target=["q_proj", "o_proj"])
    assert content["adapter"]["targets"] == ["o_proj", "q_proj"]


@pytest.mark.slow
@given(key=st.from_regex(r"[a-z_]{3,20}", fullmatch=True).filter(lambda key: not key.startswith(("wandb_", "hub_"))))
def test_key_unknown_to_the_importer_is_listed_as_omitted(key: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    result = imported(tmp_path_factory.getbasetemp(), **{f"x{key}": 1})
    assert f"x{key}" in left_out(result)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"optimizer": "muon"}, "optimizer"),
        ({"adapter": "lora", "lora_modules_to_save": ["norm"]}, "lora_modules_to_save"),
        ({"train_on_inputs": True}, "train_on_inputs"),
        ({"warmup_steps": 10}, "warmup_steps"),
        ({"special_tokens": {"eos_token": "<end>"}}, "special_tokens.eos_token"),
        (
            {"datasets": [{"path": "a.jsonl", "type": "chat_template", "field_messages": "turns"}]},
            "datasets[0].field_messages",
        ),
    ],
)
def test_imported_key_without_a_tuneserve_equivalent_is_listed_as_omitted(
    content: dict[str, Any], key: str, tmp_path: Path
) -> None:
    assert key in left_out(imported(tmp_path, **content))


def test_listed_target_layers_are_replaced_by_the_equivalent_preset_if_it_exists(tmp_path: Path) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    equal = imported(tmp_path, adapter="lora", lora_target_modules=attention)
    assert equal.content["adapter"]["targets"] == "attention"
    other = imported(tmp_path, adapter="lora", lora_target_modules=["v_proj", "down_proj"])
    assert other.content["adapter"]["targets"] == ["down_proj", "v_proj"]


def test_axolotl_warmup_steps_become_a_ratio_if_the_number_of_steps_is_known(tmp_path: Path) -> None:
    assert imported(tmp_path, warmup_steps=10, max_steps=200).content["train"]["warmup_ratio"] == 0.05


@pytest.mark.parametrize(
    "content",
    [{"rl": "grpo"}, {"reward_model": True}, {"adapter": "llama-adapter"}, {"processor_type": "AutoProcessor"}],
)
def test_config_for_an_unsupported_task_is_rejected(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        imported(tmp_path, **content)


def test_inconsistent_values_are_imported_with_a_note_explaining_why_the_trainer_rejects_them(tmp_path: Path) -> None:
    result = imported(tmp_path, sample_packing=True, neftune_noise_alpha=5)
    assert result.refused is not None
    assert "train.neftune_alpha" in result.text().splitlines()[1]


def test_invalid_value_is_left_out_with_the_reason(tmp_path: Path) -> None:
    result = imported(tmp_path, adapter="lora", lora_r=4096)
    assert result.refused is None
    assert "  lora_r: adapter.rank cannot be 4096: Input should be less than or equal to 1024" in result.note_lines()


def test_adapter_settings_of_a_full_fine_tuning_are_listed_as_not_needed(tmp_path: Path) -> None:
    result = imported(tmp_path, lora_r=8, peft_use_rslora=True, orpo_alpha=0.1)
    not_needed = {note.key for note in result.notes if note.effect is Effect.NOT_NEEDED}
    assert not_needed == {"lora_r", "peft_use_rslora", "orpo_alpha"}
    assert not left_out(result)


def test_split_of_a_held_out_dataset_is_reported_as_omitted(tmp_path: Path) -> None:
    result = imported(tmp_path, test_datasets=[{"path": "org/data", "split": "test"}])
    assert left_out(result) == {"test_datasets[0].split"}


def test_import_command_writes_the_recipe_and_lists_omitted_keys(tmp_path: Path) -> None:
    config, to = tmp_path / "My Config.yml", tmp_path / "recipe.yaml"
    config.write_text("{base_model: org/base, datasets: [{path: ./data.jsonl}], optimizer: muon}")
    result = CliRunner().invoke(group, ["recipe", "import", str(config), "--to", str(to)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "  optimizer: muon is not available" in result.output
    assert load_recipe(to).name == "my-config"
    again = CliRunner().invoke(group, ["recipe", "import", str(config), "--to", str(to)])
    assert isinstance(again.exception, RecipeError)


def test_import_command_prints_its_notes_as_json(tmp_path: Path) -> None:
    result = CliRunner().invoke(group, ["recipe", "import", str(AXOLOTL[0]), "--json"], catch_exceptions=False)
    printed = json.loads(result.output)
    assert printed["refused"] is None
    assert {note["effect"] for note in printed["notes"]} <= {effect.value for effect in Effect}


def test_config_file_of_an_unknown_tool_is_rejected(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("name: x")
    with pytest.raises(RecipeError, match="not an Axolotl or LLaMA-Factory config"):
        import_recipe(other, tmp_path)


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ({"adapter": "lora", "peft_init_lora_weights": "pissa"}, "pissa"),
        ({"adapter": "lora", "peft_init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"adapter": "lora", "peft_init_lora_weights": True}, None),
    ],
)
def test_adapter_initialization_is_imported_from_axolotl(
    content: dict[str, Any], start: str | None, tmp_path: Path
) -> None:
    result = imported(tmp_path, **content)
    assert result.content.get("adapter", {}).get("init") == start
    assert not left_out(result)


@pytest.mark.parametrize(
    "content",
    [
        {"adapter": "qlora", "peft_init_lora_weights": "pissa"},
        {"adapter": "lora", "peft_init_lora_weights": "eva"},
        {"adapter": "lora", "peft_init_lora_weights": False},
    ],
)
def test_unsupported_adapter_initialization_is_reported_as_omitted(content: dict[str, Any], tmp_path: Path) -> None:
    assert left_out(imported(tmp_path, **content)) == {"peft_init_lora_weights"}


@pytest.mark.parametrize(("iterations", "start"), [(16, "pissa_niter_16"), (-1, "pissa")])
def test_pissa_is_imported_from_llama_factory(iterations: int, start: str, tmp_path: Path) -> None:
    content = {"pissa_init": True, "pissa_iter": iterations, "pissa_convert": True}
    assert imported_from_llama_factory(tmp_path, **content)["adapter"]["init"] == start


def test_lora_plus_is_imported_from_axolotl_and_llama_factory(tmp_path: Path) -> None:
    result = imported(tmp_path, adapter="qlora", loraplus_lr_ratio=16, loraplus_lr_embedding=1e-6)
    assert (result.content["train"]["lora_plus_ratio"], left_out(result)) == (16, set())
    assert imported_from_llama_factory(tmp_path, loraplus_lr_ratio=16.0)["train"]["lora_plus_ratio"] == 16


@pytest.mark.parametrize(
    "content",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        {"overrides_of_model_config": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}},
    ],
)
def test_rope_scaling_is_imported_from_axolotl(content: dict[str, Any], tmp_path: Path) -> None:
    result = imported(tmp_path, **content)
    assert (result.content["rope_scaling"], result.refused) == ({"type": "yarn", "factor": 4.0}, None)
    assert not left_out(result)


def test_rope_scaling_that_the_engine_would_apply_differently_is_reported_as_omitted(tmp_path: Path) -> None:
    result = imported(tmp_path, overrides_of_model_config={"rope_scaling": {"type": "dynamic", "factor": 2}, "x": 1})
    assert left_out(result) == {"rope_scaling", "overrides_of_model_config"}
    assert "rope_scaling" not in result.content


def test_llama_factory_rope_scaling_without_a_factor_is_reported_as_omitted(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("{model_name_or_path: org/base, dataset: own, rope_scaling: yarn}")
    assert "rope_scaling" in left_out(import_recipe(config, tmp_path))


def test_new_tokens_are_imported_from_axolotl(tmp_path: Path) -> None:
    kept = {"tokens": ["<tool>", "</tool>"], "lora_modules_to_save": ["embed_tokens", "lm_head"]}
    result = imported(tmp_path, adapter="lora", **kept)
    assert (result.content["new_tokens"], result.refused) == (["<tool>", "</tool>"], None)
    assert not left_out(result)
    assert result.content["adapter"]["modules_to_save"] == ["embed_tokens", "lm_head"]
    assert left_out(imported(tmp_path, adapter="lora", lora_modules_to_save=["norm"])) == {"lora_modules_to_save"}


def test_new_tokens_are_imported_from_llama_factory(tmp_path: Path) -> None:
    content = imported_from_llama_factory(tmp_path, add_tokens="<a>,<b>", new_special_tokens="<c>", resize_vocab=True)
    assert content["new_tokens"] == ["<a>", "<b>", "<c>"]
