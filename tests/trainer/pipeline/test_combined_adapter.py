"""Tests that adapters of plain PEFT are combined as PEFT itself combines them, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.errors import BaseModelError, NotFoundError, RecipeError
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.version import Format
from tests.builders.peft_adapters import train_with_peft
from tests.command_line import Svc
from tests.trainer.conftest import make_model, make_recipe
from tests.trainer.pipeline.stand_ins import Make, Stages
from trainer.base_model.resolve import Base
from trainer.evaluation.parity.adapter import compare
from trainer.export.merge import merge_adapter
from trainer.model.peft_config import load_adapter
from trainer.model.stored_weights import StoredWeights
from trainer.pipeline.combined_adapter import CombinedAdapter, find_combined
from trainer.pipeline.trained_adapter import check_fits, find_adapter
from trainer.recipe.combine import CombineMethod
from trainer.recipe.stage import Stage

TOKENS = torch.arange(5, 45).reshape(2, 20)
PAIR = ("first", "second")


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return adapters of plain PEFT, which tests must not change."""
    root = tmp_path_factory.mktemp("parts")
    layers = ["k_proj", "up_proj"]
    return {
        "first": train_with_peft(tiny_base, root / "first", init_lora_weights="gaussian"),
        "second": train_with_peft(tiny_base, root / "second", lora_alpha=4, tokens=TOKENS + 30),
        "other layers": train_with_peft(tiny_base, root / "others", target_modules=layers, tokens=TOKENS + 30),
        "first layer": train_with_peft(tiny_base, root / "layer", layers_to_transform=[0]),
        "rslora": train_with_peft(tiny_base, root / "rslora", use_rslora=True),
        "rank 2": train_with_peft(tiny_base, root / "rank2", r=2, tokens=TOKENS + 30),
        "dora": train_with_peft(tiny_base, root / "dora", use_dora=True),
        "ranks": train_with_peft(tiny_base, root / "ranks", rank_pattern={"v_proj": 2}),
    }


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Return an empty registry."""
    return Registry.of(Settings(home=tmp_path / "home"))


def find(folders: Mapping[str, Path], *names: str, registry: Any = None, **options: Any) -> CombinedAdapter:
    """Return the combination of adapters with the weights 0.7 and 0.3."""
    weights = options.pop("weights", (0.7, 0.3))
    parts = [{"adapter": str(folders[n]), "weight": w} for n, w in zip(names, weights, strict=False)]
    adapter = options.pop("adapter", {})
    recipe = make_recipe(adapter={"combine": {"adapters": parts} | options} | adapter, train={"seed": 3})
    assert recipe.adapter.combine is not None
    return find_combined(recipe, recipe.adapter.combine, Path(), registry)


def updates(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the update of each layer, as PEFT computes it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def combined(base: Path, out: Path, adapter: CombinedAdapter) -> dict[str, torch.Tensor]:
    adapter.copy_to(out, base)
    return updates(base, out)


def peft_directly(base: Path, folders: Mapping[str, Path], method: str, density: float | None) -> Any:
    """Combine the pair with nothing but PEFT, on the real base, and return the updates."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folders["first"]), "first"
    )
    model.load_adapter(str(folders["second"]), "second")
    torch.manual_seed(3)
    model.add_weighted_adapter(list(PAIR), [0.7, 0.3], "both", combination_type=method, density=density)
    return {
        name: module.get_delta_weight("both").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def close(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(CombineMethod))
def test_combined_adapter_equals_the_combination_computed_by_peft(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path, method: CombineMethod
) -> None:
    density = 0.5 if method.drops else None
    adapter = find(folders, *PAIR, method=method.value, density=density)
    result = combined(tiny_base, tmp_path / "out", adapter)
    assert close(result, peft_directly(tiny_base, folders, method.value, density))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == config["lora_alpha"] == adapter.rank == (8 if method is CombineMethod.CAT else 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_combining_with_weights_one_and_zero_gives_the_first_adapter(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path, method: str
) -> None:
    result = combined(tiny_base, tmp_path / "out", find(folders, *PAIR, method=method, weights=(1, 0)))
    assert close(result, updates(tiny_base, folders["first"]))


@pytest.mark.slow
@pytest.mark.parametrize("names", [("first", "rank 2"), ("rslora", "second"), ("first", "other layers")])
def test_combining_with_the_cat_method_gives_the_exact_weighted_sum_of_the_adapter_updates(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path, names: tuple[str, str]
) -> None:
    parts = [updates(tiny_base, folders[name]) for name in names]
    result = combined(tiny_base, tmp_path / "out", find(folders, *names, method="cat"))
    zero = torch.zeros(())
    assert close(
        result,
        {name: 0.7 * parts[0].get(name, zero) + 0.3 * parts[1].get(name, zero) for name in {**parts[0], **parts[1]}},
    )


@pytest.mark.slow
def test_combined_adapter_includes_layers_found_only_in_the_second_adapter(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    result = combined(tiny_base, tmp_path / "out", find(folders, "first layer", "second", method="linear"))
    assert result.keys() == updates(tiny_base, folders["second"]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_combining_adapters_again_gives_identical_files(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path, method: str
) -> None:
    adapter = find(folders, *PAIR, method=method, density=0.5)
    adapter.copy_to(tmp_path / "one", tiny_base)
    torch.rand(7)
    adapter.copy_to(tmp_path / "two", tiny_base)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    other = replace(adapter, seed=4)
    other.copy_to(tmp_path / "other", tiny_base)
    assert (tmp_path / "other" / "adapter_model.safetensors").read_bytes() != one["adapter_model.safetensors"]
    assert other.digest != adapter.digest


@pytest.mark.slow
def test_merged_weights_give_the_same_outputs_as_the_combined_adapter(
    tiny_base: Path, folders: Mapping[str, Path], tmp_path: Path
) -> None:
    adapter = find(folders, *PAIR, method="ties", density=0.5)
    for part in adapter.parts:
        check_fits(tiny_base, part)
    adapter.copy_to(tmp_path / "adapter", tiny_base)
    assert find_adapter(str(tmp_path / "adapter"), tmp_path).config["r"] == 4
    merge_adapter(tiny_base, tmp_path / "adapter", tmp_path / "merged")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), tmp_path / "adapter")
    applied = compare(model, StoredWeights(tmp_path / "merged"))
    assert (applied.wrong, applied.off) == (None, 0)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        expected, change = model(TOKENS).logits, (model(TOKENS).logits - base(TOKENS).logits).abs().max()
        assert (merged(TOKENS).logits - expected).abs().max() < change / 20  # merged weights are rounded to 16 bits


def test_recipe_of_a_combined_adapter_has_the_rank_and_layers_of_the_result(folders: Mapping[str, Path]) -> None:
    adapter = find(folders, "first", "other layers", method="cat")
    described = adapter.describe(make_recipe())
    assert (described.rank, described.alpha) == (8, 8)
    assert described.adapter.targets == ("k_proj", "q_proj", "up_proj", "v_proj")
    assert find(folders, "first", "rank 2", method="svd", adapter={"rank": 3}).rank == 3


@pytest.mark.parametrize(
    ("names", "options", "reason"),
    [
        (
            ("first", "rank 2"),
            {"method": "linear"},
            r"first 4, .*rank2 2.*\n.*\n.* set adapter.combine.method to svd, or to cat",
        ),
        (("first", "rank 2"), {"method": "ties", "density": 0.5}, "set adapter.combine.method to ties_svd"),
        (("first", "dora"), {"method": "cat"}, "dora cannot be combined: it is DoRA"),
        (("ranks", "first"), {"method": "cat"}, "ranks cannot be combined: its layers have different ranks"),
    ],
)
def test_adapters_that_peft_cannot_combine_are_rejected_based_on_their_configs(
    folders: Mapping[str, Path], names: tuple[str, str], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        find(folders, *names, **options)


@pytest.mark.parametrize(
    ("combine", "reason"),
    [
        ({"method": "ties"}, "requires density"),
        ({"method": "linear", "density": 0.5}, "density is not used by"),
        ({"method": "mean"}, "adapter.combine.method"),
        ({"method": "cat", "adapters": [{"adapter": "./one"}]}, "at least 2"),
        ({"method": "cat", "adapters": [{"adapter": "one"}, {"adapter": "two"}]}, "adapters.0.adapter"),
    ],
)
def test_invalid_combine_section_of_a_recipe_is_rejected(tmp_path: Path, combine: dict[str, Any], reason: str) -> None:
    from trainer.recipe.file import make_recipe as read

    parts = [{"adapter": "./one"}, {"adapter": "support@3", "weight": -0.5}]
    content = {"name": "tiny", "base": "./base", "formats": ["merged"], "data": {"heldout": "heldout.jsonl"}}
    content |= {"adapter": {"combine": {"adapters": parts} | combine}}
    with pytest.raises(RecipeError, match=reason):
        read(content, (), tmp_path, "recipe.yaml")


def test_combining_a_nonexistent_version_raises_error(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="no version support@3"):
        find({"a": Path("support@3"), "b": Path("support@3")}, "a", "b", registry=registry, method="cat")


def test_versions_trained_on_a_different_base_are_rejected_for_combination(folders: Mapping[str, Path]) -> None:
    adapter = replace(find(folders, *PAIR, method="cat"), bases={"support@3": "sha256:1"})
    adapter.check_revision(Base(Path(), "org/base", None, "sha256:1"))
    with pytest.raises(BaseModelError, match=r"support@3 was trained on a different base than org/base"):
        adapter.check_revision(Base(Path(), "org/base", None, "sha256:2"))


@pytest.mark.slow
def test_adapter_that_does_not_fit_the_base_is_rejected(folders: Mapping[str, Path], tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", hidden_size=128)
    for part in find(folders, *PAIR, method="cat").parts:
        with pytest.raises(BaseModelError, match="does not fit the base"):
            check_fits(wider, part)


@pytest.mark.slow
def test_combined_adapter_goes_through_all_pipeline_stages_except_training(
    make: Make, stages: Stages, folders: Mapping[str, Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.pipeline.stages.check_fits", lambda base, adapter: None)  # the base is a stand-in
    monkeypatch.setattr(
        CombinedAdapter, "copy_to", lambda self, out, base: out.mkdir(parents=True) or (out / "x").touch()
    )
    adapter = find(folders, *PAIR, method="cat")
    content = {"method": "cat", "adapters": [{"adapter": str(folders[name])} for name in PAIR]}
    pipeline = replace(make(adapter={"combine": content}, formats=["merged"]), trained=adapter)
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert stages.ran == [Stage.MERGE]
    assert manifest.adapter_origin == f"adapters combined by cat: {folders['first']} (1), {folders['second']} (1)"
    assert manifest.formats[Format.MERGED].evaluation is not None


@pytest.mark.slow
def test_train_command_combines_a_registered_adapter_and_an_adapter_folder_into_a_new_version(
    svc: Svc, tmp_path: Path, tiny_base: Path, folders: Mapping[str, Path], examples: list[ChatExample]
) -> None:
    write_examples(tmp_path / "heldout.jsonl", examples)
    home, data = tmp_path / "home", tmp_path / "heldout.jsonl"
    given = ("import", folders["first"], "--name", "first", "--data", data, "--base", tiny_base, "--format", "adapter")
    assert svc("--home", home, *given).code == 0
    recipe = f"""
name: both
base: {tiny_base}
formats: [adapter]
data: {{heldout: heldout.jsonl}}
adapter:
  combine:
    method: linear
    adapters:
      - {{adapter: first@1, weight: 1}}
      - {{adapter: {folders["second"]}, weight: 0}}
"""
    (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
    ended = svc("--home", home, "train", tmp_path / "recipe.yaml", "--json")
    assert ended.code == 0, ended.err
    folder = Path(json.loads(ended.out)["folder"])
    assert close(updates(tiny_base, folder / "adapter"), updates(tiny_base, folders["first"]))
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys()
    assert "adapters combined by linear: first@1 (1), " in svc("--home", home, "show", "both@1").out
