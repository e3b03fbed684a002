"""Tests that a loaded adapter has its saved weights, whatever the model's data type."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from tests.forks import Forks, forking
from tests.trainer.conftest import make_recipe
from trainer.model.peft_config import adapter_config, load_adapter
from trainer.recipe.adapter import Method

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KEPT = [True, False, True]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained_adapter(base: Path, folder: Path, method: Method) -> Path:
    """Write an adapter with random weights. For AdaLoRA, one of its ranks was pruned."""
    recipe = make_recipe(method=method, adapter={"rank": 2})
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, adapter_config(recipe, ["q_proj", "v_proj"], 10))
    for name, weight in tuned.named_parameters():
        if "lora_" in name or "vera_" in name:
            torch.nn.init.normal_(weight)
    if method is Method.ADALORA:
        names = [name.removesuffix(".default") for name, _ in tuned.base_model.model.named_parameters()]
        tuned.active_peft_config.rank_pattern = {name: KEPT for name in names if name.endswith("lora_E")}
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [method for method in Method if method not in (Method.FULL, Method.QLORA)])
def test_loaded_adapter_has_the_weights_stored_in_its_file(
    base: Path, tmp_path: Path, method: Method, number_type: torch.dtype
) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", method)
    saved = load_file(adapter / "adapter_model.safetensors")
    model = load_adapter(LlamaForCausalLM.from_pretrained(base, dtype=number_type), adapter)
    loaded = get_peft_model_state_dict(model)
    assert saved
    for name, weight in saved.items():
        assert torch.equal(loaded[name], weight), name


FIRST_ADAPTER = """
import gc
import sys
import weakref
from pathlib import Path
from transformers import LlamaForCausalLM
from tests.trainer.conftest import make_recipe
from trainer.model.peft_config import add_adapter, load_adapter

def with_adapter(base, adapter):
    model = LlamaForCausalLM.from_pretrained(base)
    tuned = load_adapter(model, Path(adapter)) if adapter else add_adapter(model, make_recipe(), 10)
    return weakref.ref(model.model.layers[0])

layer = with_adapter(*sys.argv[1:])
gc.collect()
print("freed" if layer() is None else "kept")
"""


@pytest.fixture(scope="module")
def new_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    imports = "import peft; from transformers import LlamaForCausalLM; import tests.trainer.conftest"
    with forking(imports, tmp_path_factory.mktemp("forks")) as forks:
        yield forks


@pytest.mark.matrix
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_first_adapter_model_of_a_new_process_is_freed_after_use(
    new_processes: Forks, base: Path, tmp_path: Path, loaded: bool
) -> None:
    adapter = trained_adapter(base, tmp_path / "adapter", Method.LORA) if loaded else ""
    assert new_processes.run(FIRST_ADAPTER, str(base), str(adapter)).split()[-1] == "freed"
