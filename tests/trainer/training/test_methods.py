"""Tests that every method learns, and that its merged model equals the trained one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import TrainingError
from tests.trainer.conftest import losses_of, make_recipe
from trainer.export.merge import merge_adapter, unused_modules
from trainer.export.verify_merge import verify_full
from trainer.model.load import ModelForm, load_model
from trainer.model.peft_config import adapter_config, load_adapter
from trainer.recipe.adapter import AdapterType, Method, Quantization
from trainer.recipe.recipe import Recipe
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

pytestmark = pytest.mark.slow

ADAPTED = [method for method in Method if method is not Method.FULL]
IDS = torch.arange(40).reshape(2, 20)


def recipe(method: Method, **sections: Any) -> Recipe:
    rate = {Method.FULL: 3e-3, Method.VERA: 0.1}.get(method, 2e-2)
    adapter = {} if method is Method.FULL else {"rank": 4}
    train = {"batch_size": 4, "epochs": 8, "learning_rate": rate}
    return make_recipe(**{"method": method.value, "adapter": adapter, "train": train} | sections)


Trained = dict[Method, tuple[Path, TrainingSummary]]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, examples: list[ChatExample], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    results = {}
    for method in Method:
        folder = tmp_path_factory.mktemp(method.value)
        summary = train_model(
            tiny_base,
            TrainingData(examples),
            recipe(method),
            folder / "trained",
            folder / "checkpoints",
            number_type=NumberType.BFLOAT16,
        )
        results[method] = folder / "trained", summary
    return results


@pytest.mark.parametrize("method", Method)
def test_every_method_lowers_heldout_loss(trained: Trained, method: Method) -> None:
    losses = losses_of(trained[method][1])
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("method", Method)
def test_trained_weights_are_written_only_as_safetensors(trained: Trained, method: Method) -> None:
    names = {path.suffix for path in trained[method][0].rglob("*") if path.is_file()}
    assert ".safetensors" in names
    assert not names & {".bin", ".pt", ".pth", ".pkl"}


@pytest.mark.parametrize("method", ADAPTED)
def test_merged_model_matches_the_outputs_of_base_plus_adapter(
    trained: Trained, method: Method, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = trained[method][0]
    merge_adapter(tiny_base, adapter, tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        untrained = base(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
        beside = load_adapter(base, adapter)(IDS).logits
    assert (merged - beside).abs().max() < 0.1 * (merged - untrained).abs().max()


def test_full_fine_tuning_changes_every_layer(trained: Trained, tiny_base: Path) -> None:
    assert verify_full(tiny_base, trained[Method.FULL][0]).modules == 2 * 7


def test_verification_fails_when_the_model_was_not_trained(tiny_base: Path) -> None:
    with pytest.raises(TrainingError, match="still has the base model's weights"):
        verify_full(tiny_base, tiny_base)


def test_full_fine_tuning_writes_bf16_weights(trained: Trained) -> None:
    weights = load_file(trained[Method.FULL][0] / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [AdapterType.DORA, AdapterType.ADALORA, AdapterType.VERA])
def test_every_adapter_type_learns_on_frozen_4_bit_weights(
    kind: AdapterType, tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """Covers combinations that have no method name, such as QDoRA."""
    rate = 0.1 if kind is AdapterType.VERA else 2e-2
    changed = make_recipe(
        adapter={"type": kind, "rank": 4},
        quantization="nf4",
        train={"batch_size": 4, "epochs": 8, "learning_rate": rate},
    )
    adapter = tmp_path / "adapter"
    summary = train_model(
        tiny_base, TrainingData(examples), changed, adapter, tmp_path / "checkpoints", number_type=NumberType.FLOAT32
    )
    assert losses_of(summary)[-1] < losses_of(summary)[0] - 0.2
    assert merge_adapter(tiny_base, adapter, tmp_path / "merged").modules > 0


def test_qlora_keeps_frozen_weights_in_4_bits(tiny_base: Path) -> None:
    layer = load_model(tiny_base, ModelForm(NumberType.BFLOAT16, Quantization.NF4)).model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype is torch.bfloat16


class Products(TorchDispatchMode):
    """Records the data types of matrix products in the forward and backward pass."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "attention", "mv", "dequantize_4bit", "gemv_4bit", "gemm_4bit")

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if any(part in name for part in self.NAMES):
            operand_types = [x.dtype for x in (*args, result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            self.types.setdefault(name, set()).update(operand_types)
        return result


@pytest.mark.parametrize(
    ("method", "number_type"),
    [
        *((method, NumberType.FLOAT32) for method in Method),
        *((method, NumberType.BFLOAT16) for method in (Method.FULL, Method.LORA, Method.QLORA)),
    ],
)
def test_matrix_multiplications_use_the_requested_dtype(
    method: Method, number_type: NumberType, tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """A single bfloat16 product in float32 training would dominate the time on a CPU without a bfloat16 kernel."""
    changed = recipe(method, train={"batch_size": 4, "steps": 6}, stopping={"every_steps": 3})
    data, out = TrainingData(examples, examples[:5]), tmp_path / "trained"
    with Products() as products:
        train_model(tiny_base, data, changed, out, tmp_path / "checkpoints", number_type=number_type)
        if method is not Method.FULL:
            merge_adapter(tiny_base, out, tmp_path / "merged")
    used = set().union(*products.types.values())
    if number_type is NumberType.FLOAT32:
        assert used == {torch.float32}, products.types
    else:
        assert torch.bfloat16 in used


@pytest.mark.parametrize("number_type", [NumberType.BFLOAT16, NumberType.FLOAT32])
def test_all_layers_of_a_plain_lora_adapter_are_fused(
    number_type: NumberType,
    tiny_base: Path,
    examples: list[ChatExample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("PEFT's own forward was called")

    monkeypatch.setattr(Linear, "forward", refuse)
    changed = recipe(Method.LORA, stopping={"every_steps": 3})
    data, out = TrainingData(examples, examples[:5]), tmp_path / "trained"
    train_model(tiny_base, data, changed, out, tmp_path / "checkpoints", number_type=number_type)


def test_measuring_heldout_loss_does_not_change_qlora_weights(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """On some CPUs, bitsandbytes packs weights for a kernel without a gradient when a model is evaluated."""
    written = []
    for name, stopping in (("without", {}), ("with", {"every_steps": 2})):
        changed = recipe(Method.QLORA, train={"batch_size": 4, "steps": 6}, stopping=stopping)
        data = TrainingData(examples, examples[:5])
        train_model(
            tiny_base, data, changed, tmp_path / name, tmp_path / f"checkpoints-{name}", number_type=NumberType.BFLOAT16
        )
        written.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_qlora_computes_in_the_requested_dtype(tiny_base: Path) -> None:
    for number_type in NumberType:
        model = load_model(tiny_base, ModelForm(number_type, Quantization.NF4)).model
        assert model.layers[0].mlp.up_proj.compute_dtype is getattr(torch, number_type)
        assert model.embed_tokens.weight.dtype is getattr(torch, number_type)


def test_adapters_are_trained_in_float32(trained: Trained) -> None:
    for method in ADAPTED:
        weights = load_file(trained[method][0] / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}, method


def test_adalora_ends_with_the_requested_mean_rank(trained: Trained) -> None:
    config = json.loads((trained[Method.ADALORA][0] / "adapter_config.json").read_text("utf-8"))
    ranks = [sum(mask) for mask in config["rank_pattern"].values()]
    assert len(ranks) == 2 * 7
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1, "all ranks are equal, so none were distributed"


def test_adalora_schedule_uses_the_actual_number_of_steps() -> None:
    config = adapter_config(recipe(Method.ADALORA), "all-linear", steps=200)
    assert isinstance(config, AdaLoraConfig)
    assert (config.total_step, config.tinit, config.tfinal, config.target_r, config.init_r) == (200, 20, 60, 4, 6)


@pytest.mark.parametrize("batch_size", [4, 8, 16])
def test_adalora_run_of_up_to_three_steps_can_be_trained_and_merged(
    batch_size: int, tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    """The batch sizes result in three steps, two steps and one step."""
    changed = recipe(Method.ADALORA, train={"batch_size": batch_size, "learning_rate": 2e-2})
    out = tmp_path / "trained"
    summary = train_model(
        tiny_base, TrainingData(examples), changed, out, tmp_path / "checkpoints", number_type=NumberType.BFLOAT16
    )
    assert summary.steps == -(-len(examples) // batch_size)
    assert merge_adapter(tiny_base, out, tmp_path / "merged").modules > 0


def test_module_pruned_to_rank_zero_by_adalora_may_keep_the_base_weights(tmp_path: Path) -> None:
    pattern = {"model.layers.0.mlp.up_proj.lora_E": [False] * 6, "model.layers.1.mlp.up_proj.lora_E": [True, False]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank_pattern": pattern}), "utf-8")
    assert unused_modules(tmp_path) == {"model.layers.0.mlp.up_proj"}


def test_rslora_scaling_is_alpha_divided_by_the_square_root_of_the_rank(tiny_base: Path) -> None:
    config = adapter_config(recipe(Method.LORA, adapter={"rank": 16, "rslora": True}), "all-linear", steps=9)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert get_peft_model(model, config).base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 8


@pytest.mark.parametrize(
    ("method", "adapter", "message"),
    [
        ("full", {"rank": 8}, "adapter.rank is not used by `method: full`"),
        ("vera", {"alpha": 8}, "adapter.alpha is not used by vera"),
        ("adalora", {"rslora": True}, "adapter.rslora is not used by adalora"),
    ],
)
def test_recipe_key_that_does_not_apply_to_the_method_is_rejected(
    method: str, adapter: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(method=method, adapter=adapter)
