"""Tests a run's folder: which recipes share it, and the progress of its stages."""

import os
import shutil
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.preference import PreferencePair
from svc.errors import DiskSpaceError
from svc.evaluation.general.general_set import GeneralSet
from svc.version import Format
from tests.trainer.conftest import make_example, make_recipe
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.pipeline.run_folder import Run
from trainer.pipeline.stage_key import stage_keys
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUALIFY_STAGES, Stage

BASE = Base(Path("/base"), "./base", "Apache-2.0", "sha256:0")
EXAMPLES = Examples((make_example("a", "b"),), (make_example("c", "d"),), "sha256:1", "sha256:2", ())


@dataclass(frozen=True)
class Figures:
    loss: float
    steps: tuple[int, ...]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, dict.fromkeys(Stage, "key"))


def folder(recipe: Recipe, base: Base = BASE, examples: Examples = EXAMPLES) -> Path:
    return Run.of(Path("/runs"), recipe, base, examples).folder


def test_run_folder_is_the_same_for_equal_recipes_and_data() -> None:
    assert folder(make_recipe()) == folder(make_recipe())
    assert folder(make_recipe()).name.startswith("tiny-")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"train": {"seed": 1}},
        {"train": {"learning_rate": 1e-4}},
        {"adapter": {"rank": 4}},
        {"stopping": {"keep_best": True}},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
    ids=str,
)
def test_run_folder_depends_on_every_recipe_key_that_affects_training(change: dict[str, Any]) -> None:
    assert folder(make_recipe(**change)) != folder(make_recipe())


@pytest.mark.parametrize(
    ("method", "spelled_out"),
    [
        ({"method": "lora"}, {}),
        ({"method": "dora"}, {"adapter": {"type": "dora"}}),
        ({"method": "qlora"}, {"quantization": "nf4"}),
        ({"method": "qlora"}, {"method": "lora", "quantization": "nf4"}),
    ],
)
def test_training_method_and_its_equivalent_recipe_keys_lead_to_the_same_run_folder(
    method: dict[str, Any], spelled_out: dict[str, Any]
) -> None:
    assert folder(make_recipe(**method)) == folder(make_recipe(**spelled_out))


def test_run_folder_changes_with_the_base() -> None:
    assert folder(make_recipe(), base=replace(BASE, revision="sha256:9")) != folder(make_recipe())


OTHER_TRAIN, OTHER_HELDOUT = (
    replace(EXAMPLES, train_fingerprint="sha256:9"),
    replace(EXAMPLES, heldout_fingerprint="sha256:9"),
)


def test_run_folder_changes_with_the_training_data() -> None:
    assert folder(make_recipe(), examples=OTHER_TRAIN) != folder(make_recipe())


def test_run_folder_depends_on_heldout_data_only_if_early_stopping_is_enabled() -> None:
    assert folder(make_recipe(), examples=OTHER_HELDOUT) == folder(make_recipe())
    looks = make_recipe(stopping={"patience": 2})
    assert folder(looks, examples=OTHER_HELDOUT) != folder(looks)


def test_run_folder_depends_on_the_validation_data_but_not_the_heldout_data_when_both_are_given() -> None:
    validated, looks = replace(EXAMPLES, validation=EXAMPLES.heldout), make_recipe(stopping={"patience": 2})
    other_heldout = replace(validated, heldout_fingerprint="sha256:9")
    other_validation = replace(validated, validation=(make_example("e", "f"),))
    assert folder(looks, examples=other_heldout) == folder(looks, examples=validated)
    assert folder(looks, examples=other_validation) != folder(looks, examples=validated)


JUDGED = {Stage.EVALUATE, *QUALIFY_STAGES.values(), Stage.PARITY, Stage.JUDGE, Stage.REGISTER}
QUANTIZED = {Stage.QUANTIZE, Stage.QUALIFY, Stage.QUANTIZE_AWQ, Stage.QUALIFY_AWQ, Stage.PARITY, Stage.REGISTER}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"quantize": {"group_size": 32}}, QUANTIZED),
        ({"quantize": {"samples": 8}}, QUANTIZED),
        ({"quantize": {"sequential": False}}, {Stage.QUANTIZE, Stage.QUALIFY, Stage.PARITY, Stage.REGISTER}),
        ({"evaluate": {"max_tokens": 8}}, JUDGED),
        ({"evaluate": {"limit": 1}}, JUDGED),
        ({"qualify": {"repeats": 2}}, JUDGED),
        ({"evaluate": {"max_gptq_loss": 0.5}}, {Stage.REGISTER}),
        ({"evaluate": {"max_gptq_nll": 0.5}}, {Stage.REGISTER}),
        ({"evaluate": {"metrics": ["chrf"]}}, {Stage.REGISTER}),
        ({"evaluate": {"primary": "chrf"}}, {Stage.REGISTER}),
        ({"judge": {"url": "http://127.0.0.1/v1", "model": "m"}}, {Stage.JUDGE, Stage.REGISTER}),
        ({"formats": ["merged"]}, {Stage.PARITY, Stage.REGISTER}),
        ({"formats": ["merged", "gptq", "int8"]}, {Stage.PARITY, Stage.REGISTER}),
        ({"checkpoints": {"keep": 7}}, set()),
        ({"stopping": {"curve": False}}, set()),
        ({"train": {"seed": 1}}, set(Stage)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_changing_a_recipe_key_repeats_only_the_stages_that_depend_on_it(
    change: dict[str, Any], again: set[Stage]
) -> None:
    before, after = (stage_keys(recipe, BASE, EXAMPLES) for recipe in (make_recipe(), make_recipe(**change)))
    assert {stage for stage in Stage if before[stage] != after[stage]} == again


def test_merging_into_different_weights_repeats_every_stage_except_training() -> None:
    recipes = make_recipe(method="qlora"), make_recipe(method="qlora", merge_dequantized=True)
    before, after = (stage_keys(recipe, BASE, EXAMPLES) for recipe in recipes)
    assert {stage for stage in Stage if before[stage] == after[stage]} == {Stage.TRAIN}


def test_evaluations_are_repeated_when_general_questions_change() -> None:
    asked = GeneralSet("own.jsonl", (make_example("g", "h"),), (("h",),))
    before, after = (stage_keys(make_recipe(), BASE, replace(EXAMPLES, questions=each)) for each in (None, asked))
    assert {stage for stage in Stage if before[stage] != after[stage]} == JUDGED


def test_evaluations_are_repeated_when_heldout_examples_change() -> None:
    before, after = (stage_keys(make_recipe(), BASE, examples) for examples in (EXAMPLES, OTHER_HELDOUT))
    assert {stage for stage in Stage if before[stage] != after[stage]} == JUDGED | {Stage.EXPORT_GGUF}


PAIR = PreferencePair(make_example("a", "b"), make_example("a", "x"))
PAIRS = replace(EXAMPLES, preferences=(PAIR,), heldout_preferences=(PAIR,))


@pytest.mark.parametrize(
    "change", [{"objective": "orpo"}, {"preference": {"beta": 0.5}}, {"stopping": {"curve": False}}]
)
def test_run_folder_of_a_preference_recipe_changes_with_its_objective_and_settings(change: dict[str, Any]) -> None:
    first, second = make_recipe(objective="dpo"), make_recipe(**{"objective": "dpo"} | change)
    assert folder(first, examples=PAIRS) != folder(second, examples=PAIRS)


def test_run_folder_of_a_preference_recipe_changes_when_its_heldout_pairs_change() -> None:
    other = replace(PAIR, rejected=make_example("a", "z"))
    recipe = make_recipe(objective="dpo")
    assert folder(recipe, examples=replace(PAIRS, heldout_preferences=(other,))) != folder(recipe, examples=PAIRS)


def test_run_uses_the_same_folder_after_base_and_data_are_moved() -> None:
    moved = make_recipe(base="/mnt/base", data={"train": "/mnt/t.jsonl", "heldout": "/mnt/h.jsonl"})
    assert folder(moved) == folder(make_recipe())


def test_stage_is_marked_done_once_its_result_is_saved(run: Run) -> None:
    assert not run.done(Stage.TRAIN)
    run.save(Stage.TRAIN, Figures(0.1, (1, 2)))
    assert run.done(Stage.TRAIN)
    assert not run.done(Stage.MERGE)
    assert run.load(Stage.TRAIN, Figures) == Figures(0.1, (1, 2))


def test_stage_counts_as_unfinished_after_its_input_has_changed(run: Run) -> None:
    run.save(Stage.TRAIN, Figures(0.1, ()))
    assert not Run(run.folder, {Stage.TRAIN: "other"}).done(Stage.TRAIN)


def test_stage_is_not_done_if_its_output_files_are_missing(run: Run) -> None:
    run.save(Stage.TRAIN, Figures(0.1, ()))
    assert not run.done(Stage.TRAIN, run.adapter)
    run.adapter.mkdir()
    assert run.done(Stage.TRAIN, run.adapter)


def test_stage_is_no_longer_done_once_it_is_restarted(run: Run) -> None:
    run.save(Stage.TRAIN, Figures(0.1, ()))
    run.begin(Stage.TRAIN)
    assert not run.done(Stage.TRAIN)


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_stage_is_not_done_if_its_result_file_is_invalid(run: Run, content: str) -> None:
    (run.folder / "train.json").write_text(content)
    assert not run.done(Stage.TRAIN)


def test_stage_counts_as_unfinished_if_saving_its_result_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", cut_off)
    with pytest.raises(OSError, match="no space left"):
        run.save(Stage.TRAIN, Figures(0.1, ()))
    assert not run.done(Stage.TRAIN)


@pytest.mark.parametrize("linked", [True, False])
def test_cleaning_a_run_keeps_only_weights_hard_linked_to_the_registry(run: Run, linked: bool) -> None:
    run.save(Stage.TRAIN, Figures(0.1, ()))
    for folder in (run.adapter, run.merged, run.weights(Format.GPTQ), run.checkpoints):
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if linked:
            os.link(folder / "model.safetensors", run.folder / f"{folder.name}.registered")
    run.clean()
    assert run.done(Stage.TRAIN)
    assert [folder.exists() for folder in (run.adapter, run.merged, run.weights(Format.GPTQ))] == [linked] * 3
    assert not run.checkpoints.exists()


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))


def test_disk_space_check_passes_with_enough_free_space(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    free_bytes(monkeypatch, 500_000_000)
    run.require_space(Stage.MERGE, 500_000_000)


def test_insufficient_disk_space_error_states_how_much_to_free_and_names_the_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes(monkeypatch, 200_000_000)
    with pytest.raises(DiskSpaceError) as caught:
        run.require_space(Stage.MERGE, 500_000_000)
    assert caught.value.wrong == f"stage merge needs 500 MB in {run.folder}, but only 200 MB are free"
    assert "free up 300 MB" in caught.value.todo


def test_run_folder_does_not_depend_on_data_paths() -> None:
    moved = make_recipe(data={"train": ["/mnt/t", "hf:a/b"], "heldout": "/mnt/h.jsonl", "general": "/mnt/g"})
    assert folder(moved) == folder(make_recipe())
