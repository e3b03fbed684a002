"""Tests that correct versions pass all parity checks, and that each planted fault fails its check."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.registry.parity import ParityReport
from svc.version import Format
from tests.svc.registry.parity import SPEED
from tests.trainer.conftest import make_example, make_model, make_recipe
from trainer.base_model.content import copy_shipped_files
from trainer.data.chat_template import tokenize_as_trained
from trainer.evaluation.parity.files import unreadable_weights
from trainer.evaluation.parity.quantized import expand
from trainer.evaluation.parity.report import BESIDE_NF4, BESIDE_TRAINED, Made, load, make_report, score
from trainer.evaluation.qualification import EngineReading
from trainer.evaluation.token_scores import Scores, choose_examples
from trainer.export.merge import merge_adapter
from trainer.model.peft_config import add_adapter
from trainer.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

TYPE = NumberType.FLOAT32
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"adapter": {"rslora": True, "rank": 4}},
    "attention": {"adapter": {"targets": "attention-min", "alpha": 3}},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
    "vera": {"method": "vera"},
    "qlora": {"method": "qlora"},
    "qlora, merged into NF4": {"method": "qlora", "merge_dequantized": True},
}


@dataclass(frozen=True)
class Version:
    """Output of a run, with its recipe and the tokenized held-out examples."""

    made: Made
    recipe: Recipe
    examples: list[TokenizedExample]

    def report(self, number_type: NumberType = TYPE) -> ParityReport:
        """Return the parity report for an engine that correctly computes what the folders contain.

        Args:
            number_type: data type in which the trainer's models compute.
        """
        formats = {format: (folder, self._read(folder)) for format, (folder, _) in self.made.formats.items()}
        made = replace(self.made, formats=formats)
        return make_report(made, self.recipe, self.examples, len(self.examples), number_type=number_type)

    def _read(self, folder: Path) -> EngineReading:
        scores: Scores = ()
        if unreadable_weights(folder) is None:  # otherwise no engine could answer
            model = load(folder, TYPE) if folder == self.merged else dequantized(folder, self.made.base)
            scores = score(model, self.examples)
        return EngineReading(prompts_differ=(), scores=scores, speed=SPEED)

    @property
    def merged(self) -> Path:
        """Return the folder of the merged format."""
        return self.made.merged

    @property
    def gptq(self) -> Path:
        """Return the folder of the GPTQ format."""
        return self.made.formats[Format.GPTQ][0]


def quantize(merged: Path, out: Path) -> Path:
    """Round every linear layer to the nearest of 16 values, and write it in GPTQ's layout."""
    shutil.copytree(merged, out)
    tensors = {}
    for name, weight in load_file(merged / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        layer, columns = name.removesuffix(".weight"), weight.float().T
        groups = columns.reshape(-1, 32, columns.shape[1])
        scales = groups.abs().amax(dim=1) / 7
        numbers = (groups / scales[:, None]).round().add(8).clamp(0, 15).to(torch.int32).reshape(columns.shape)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (numbers.reshape(-1, 8, columns.shape[1]) << shifts[None, :, None]).sum(dim=1).to(torch.int32)
        tensors |= {f"{layer}.qweight": packed, f"{layer}.scales": scales.half()}
    save_file(tensors, out / "model.safetensors")
    return out


def dequantized(folder: Path, base: Path) -> torch.nn.Module:
    """Return a model in the base's shape with a folder's dequantized weights."""
    tensors = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        weights[f"{layer}.weight"] = expand(tensors[name], tensors[f"{layer}.scales"], None)
    model = load(base, TYPE)
    model.load_state_dict(weights, strict=False)
    return model


def make_version(folder: Path, base: Path, *, trained: float = 0.3, **sections: Any) -> Version:
    """Return a version whose adapter weights have changed by the given share."""
    recipe = make_recipe(**sections)
    torch.manual_seed(1)
    model = add_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), recipe, steps=20)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                scale = trained if "magnitude" not in name else trained / 3
                weight.add_(scale * torch.randn_like(weight) * (weight.abs().mean() + 0.1))
    model.save_pretrained(folder / "adapter")
    copy_shipped_files(base, folder / "adapter")
    merge_adapter(base, folder / "adapter", folder / "merged", dequantized=recipe.merge_dequantized)
    quantize(folder / "merged", folder / "gptq")
    heldout = [make_example(f"which {number}", answer) for number, answer in enumerate(("red", "blue", "green"))]
    examples = choose_examples(tokenize_as_trained(base, heldout, {}))
    nothing = EngineReading(prompts_differ=(), scores=(), speed=SPEED)
    formats = {Format.MERGED: (folder / "merged", nothing), Format.GPTQ: (folder / "gptq", nothing)}
    return Version(Made(base, folder / "adapter", folder / "merged", formats), recipe, examples)


@pytest.fixture(scope="module")
def correct(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Version]:
    """Return a function that makes a version of each kind once; tests must not change it."""
    return cache(lambda kind: make_version(tmp_path_factory.mktemp("version"), tiny_base, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_correct_version_passes_all_parity_checks(correct: Callable[[str], Version], kind: str) -> None:
    report = correct(kind).report()
    assert report.failed == ()
    assert {check.name.partition(":")[0] for check in report.checks} == {"merged", "gptq", "merge"}


@pytest.mark.parametrize(("kind", "compared"), [("lora", False), ("qlora", True), ("qlora, merged into NF4", False)])
def test_qlora_version_merged_into_unquantized_weights_is_also_compared_with_the_nf4_model(
    correct: Callable[[str], Version], kind: str, compared: bool
) -> None:
    differences = correct(kind).report().differences
    assert (BESIDE_NF4 in differences) is compared
    assert not compared or differences[BESIDE_NF4].mean > 0


def test_parity_fails_when_the_adapter_was_merged_into_the_wrong_base_weights(
    correct: Callable[[str], Version],
) -> None:
    report = replace(correct("qlora"), recipe=make_recipe(method="qlora", merge_dequantized=True)).report()
    assert any("base plus adapter" in failure for failure in report.failed)


def test_correct_version_of_a_float16_base_passes_parity(tmp_path: Path, tiny_base: Path) -> None:
    """Llama 2 is published in float16. Training rounds its weights to bf16, and merging does not."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    finer = {name: weight.half() * (1 + torch.rand(weight.shape) / 256) for name, weight in weights.items()}
    save_file({name: weight.half() for name, weight in finer.items()}, base / "model.safetensors", {"format": "pt"})
    change_json(base / "config.json", dtype="float16")
    version = make_version(tmp_path, base, trained=3.0)
    assert version.report(NumberType.BFLOAT16).failed == ()


@pytest.mark.parametrize(("kind", "trained"), [("lora", 1e-3), ("dora", 1e-2), ("vera", 1e-3)])
def test_parity_passes_when_training_changed_the_weights_only_slightly(
    tmp_path: Path, tiny_base: Path, kind: str, trained: float
) -> None:
    """The learned change is smaller than the precision of bf16."""
    report = make_version(tmp_path, tiny_base, trained=trained, **KINDS[kind]).report()
    assert report.failed == ()
    assert report.differences["merged compared with trained, both in transformers"].mean < 1e-3


def test_template_that_renders_the_current_date_is_served_with_a_fixed_date(tmp_path: Path, tiny_base: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }} " + template.read_text())
    version = make_version(tmp_path, base)
    assert version.report().failed == ()
    for folder in (version.merged, version.gptq):
        assert (folder / "chat_template.jinja").read_text().startswith('{{ "2024" }} ')


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "vera", "qlora"])
def test_model_with_adapter_is_freed_before_another_model_is_loaded(
    correct: Callable[[str], Version], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    version = correct(kind)
    layers: list[weakref.ref[torch.nn.Module]] = []
    alive: list[list[bool]] = []

    def observed(folder: Path, number_type: NumberType) -> Any:
        alive.append([layer() is not None for layer in layers])
        model = load(folder, number_type)
        layers.extend(map(weakref.ref, model.modules()))
        return model

    monkeypatch.setattr("trainer.evaluation.parity.report.load", observed)
    gc.disable()  # so that the collector frees nothing by chance
    try:
        version.report(NumberType.BFLOAT16)
    finally:
        gc.enable()
    before_base, *before_others = alive
    assert not before_base
    assert before_others and all(before_others)
    assert not any(map(any, before_others))


@pytest.fixture
def version(tmp_path: Path, tiny_base: Path) -> Version:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    return make_version(tmp_path, base)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


def change_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def scaled_update(times: float) -> Callable[[Version], None]:
    """Return a change that merges the adapter the given number of times."""

    def plant(version: Version) -> None:
        base = load_file(version.made.base / "model.safetensors")

        def change(merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            sums = {name: base[name] + times * (weight.float() - base[name]) for name, weight in merged.items()}
            return {name: total.bfloat16() for name, total in sums.items()}

        change_weights(version.merged, change)

    return plant


def other_template(version: Version) -> None:
    path = version.merged / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "model"))


def no_bos(version: Version) -> None:
    change_json(version.gptq / "tokenizer_config.json", add_bos_token=False)


def other_tokenizer(version: Version) -> None:
    path = version.merged / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))


def shuffled_layer(version: Version) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(version.merged, lambda weights: weights | {name: weights[name].flip(0).contiguous()})


def corrupted_scales(version: Version) -> None:
    name = "model.layers.0.mlp.down_proj.scales"
    change_weights(version.gptq, lambda weights: weights | {name: weights[name] * 2})


def untied_head(version: Version) -> None:
    change_json(version.merged / "config.json", tie_word_embeddings=False)


def truncated_shard(version: Version) -> None:
    path = version.merged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_generation(version: Version) -> None:
    change_json(version.merged / "generation_config.json", repetition_penalty=1.3)


def wrong_alpha(version: Version) -> None:
    assert version.made.adapter is not None
    change_json(version.made.adapter / "adapter_config.json", lora_alpha=64)


FAULTS: dict[str, tuple[Callable[[Version], None], str]] = {
    "adapter not applied": (scaled_update(0), "merge: the adapter is applied once"),
    "adapter applied twice": (scaled_update(2), "merge: the adapter is applied once"),
    "wrong alpha": (scaled_update(0.8), "merge: the adapter is applied once"),
    "another alpha in the adapter": (wrong_alpha, "merge: scale"),
    "another template": (other_template, "merged: tokenizer, chat template, generation config"),
    "a missing BOS": (no_bos, "gptq: tokenizer, chat template, generation config"),
    "another tokenizer": (other_tokenizer, "merged: tokenizer, chat template, generation config"),
    "one layer shuffled": (shuffled_layer, "merge: base plus adapter"),
    "GPTQ scales corrupted": (corrupted_scales, "gptq: weight rounding"),
    "tied head untied": (untied_head, "merged: config"),
    "truncated shard": (truncated_shard, "merged: weight files"),
    "another generation config": (other_generation, "merged: tokenizer, chat template, generation config"),
}


@pytest.mark.parametrize(("plant", "check"), FAULTS.values(), ids=FAULTS)
def test_each_parity_check_detects_its_injected_fault(
    version: Version, plant: Callable[[Version], None], check: str
) -> None:
    plant(version)
    assert check in {result.name for result in version.report().checks if not result.passed}


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_parity_fails_when_alpha_differs_from_the_recipe(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    version = make_version(tmp_path, tiny_base, **KINDS[kind])
    wrong_alpha(version)
    assert "merge: scale" in {result.name for result in version.report().checks if not result.passed}


def test_parity_fails_when_the_engine_computes_different_token_scores(version: Version) -> None:
    """All files are correct, and only the engine's scores differ."""
    scores = score(load(version.made.base, TYPE), version.examples)
    formats = {Format.MERGED: (version.merged, EngineReading(prompts_differ=(), scores=scores, speed=SPEED))}
    made = replace(version.made, formats=formats)
    report = make_report(made, version.recipe, version.examples, 3, number_type=TYPE)
    assert [failure.split(": 0.")[0] for failure in report.failed] == [
        "merged: engine compared with transformers, the same weights",
        BESIDE_TRAINED,
    ]


def test_final_parity_check_fails_when_the_engine_matches_a_merged_model_that_differs_from_the_trained_model(
    version: Version,
) -> None:
    scaled_update(2)(version)
    passed = {check.name: check.passed for check in version.report().checks}
    assert passed["merged: engine compared with transformers, the same weights"]
    assert not passed[BESIDE_TRAINED]


def test_parity_fails_when_the_engine_tokenizes_prompts_differently_from_training(version: Version) -> None:
    reading = EngineReading(prompts_differ=(1, 2), scores=(), speed=SPEED)
    made = replace(version.made, formats={Format.MERGED: (version.merged, reading)})
    report = make_report(made, version.recipe, version.examples, 3, number_type=TYPE)
    (failure,) = report.failed
    assert failure.startswith("merged: prompt tokens on the engine: 1 of 3 prompts match; the first that differs")


def test_adapter_is_not_compared_for_full_fine_tuning(tmp_path: Path, tiny_base: Path) -> None:
    merged = make_model(tmp_path / "merged")
    change_weights(merged, lambda weights: {name: weight * 1.01 for name, weight in weights.items()})
    quantize(merged, tmp_path / "gptq")
    examples = choose_examples(tokenize_as_trained(tiny_base, [make_example("which", "red")], {}))
    nothing = EngineReading(prompts_differ=(), scores=(), speed=SPEED)
    formats = {Format.MERGED: (merged, nothing), Format.GPTQ: (tmp_path / "gptq", nothing)}
    version = Version(Made(tiny_base, None, merged, formats), make_recipe(method="full"), examples)
    assert version.report().failed == ()


def test_gptq_is_compared_with_the_trained_model_if_there_is_no_merged_format(version: Version) -> None:
    alone = replace(version, made=replace(version.made, formats={Format.GPTQ: version.made.formats[Format.GPTQ]}))
    assert alone.report().failed == ()
    scaled_update(2)(version)
    shutil.rmtree(version.gptq)
    quantize(version.merged, version.gptq)
    assert any("applied once" in failure for failure in alone.report().failed)
