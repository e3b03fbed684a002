"""Tests the GGUF files, with transformers' reader of GGUF as the judge of names, order and numbers."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.utils.quantization_config import GgufConfig

from svc.dataset.schema.example import ChatExample
from svc.errors import TrainingError
from svc.model_folder.chat_template import write_template_kwargs
from tests.builders.gguf_models import GEMMA
from tests.builders.mixtures import write_mixture
from tests.trainer.conftest import make_model, make_tokenizer
from trainer.export.gguf import writer as module
from trainer.export.gguf.architecture import read_architecture
from trainer.export.gguf.writer import MAX_CHANGE, MODELFILE, GgufType, export_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_family(folder: Path, family: str) -> Path:
    """Write a tiny chat model of a family, whose heads are wider than the hidden size over their number."""
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
    }
    shape |= {"head_dim": 128} if family == "qwen3" else {}
    shape |= {"sliding_window": None} if family == "mistral" else {}
    shape |= GEMMA if family == "gemma2" else {}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # other than the 1 or 0 of a new model
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(folder: Path, file: str | None = None) -> torch.Tensor:
    options = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)} if file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(3, 40)[None]).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_gguf_file_loaded_by_transformers_gives_the_logits_of_the_original_model(
    tmp_path: Path, examples: list[ChatExample], family: str
) -> None:
    base = make_family(tmp_path / "base", family)
    done = export_gguf(base, tmp_path / "out", "tiny", examples, type=GgufType.F16)
    assert done.compared == len(examples)
    assert torch.allclose(logits(tmp_path / "out", done.file.name), logits(base), atol=1e-4)


@pytest.mark.slow
def test_q8_0_file_stores_matrices_in_8_bits_and_vectors_in_32_bits(
    tiny_base: Path, tmp_path: Path, examples: list[ChatExample]
) -> None:
    done = export_gguf(tiny_base, tmp_path, "tiny", examples)
    assert done.file.name == "tiny-q8_0.gguf"
    reader = gguf.GGUFReader(done.file)
    types = {len(tensor.shape): tensor.tensor_type for tensor in reader.tensors}
    assert types == {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.Q8_0}
    assert 0 < done.worst_change < MAX_CHANGE[GgufType.Q8_0]
    field = reader.get_field("tokenizer.ggml.pre")
    assert field is not None
    assert field.contents() == done.pre == "gpt-2"


@pytest.mark.slow
def test_model_with_nan_weights_is_rejected(tmp_path: Path, examples: list[ChatExample]) -> None:
    base = make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(TrainingError, match=r"blk\.0\.ffn_up\.weight changed by inf"):
        export_gguf(base, tmp_path / "out", "tiny", examples, type=GgufType.F16)
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.slow
def test_matrix_is_written_in_16_bits_if_its_row_length_is_not_a_multiple_of_the_8_bit_block_size(
    tmp_path: Path, examples: list[ChatExample]
) -> None:
    base = make_model(tmp_path / "base", intermediate_size=72)
    reader = gguf.GGUFReader(export_gguf(base, tmp_path / "out", "tiny", examples).file)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] is gguf.GGMLQuantizationType.F16
    assert types["blk.0.ffn_up.weight"] is gguf.GGMLQuantizationType.Q8_0


@pytest.mark.slow
def test_chat_template_in_the_gguf_file_sets_the_template_arguments_of_the_model(
    tmp_path: Path, examples: list[ChatExample]
) -> None:
    base = make_model(tmp_path / "base")
    write_template_kwargs(base, {"enable_thinking": False, "date_string": "26 Jul 2024"})
    reader = gguf.GGUFReader(export_gguf(base, tmp_path / "out", "tiny", examples).file)
    field = reader.get_field("tokenizer.chat_template")
    assert field is not None
    start = "{%- set date_string = '26 Jul 2024' -%}{%- set enable_thinking = false -%}{% for message"
    assert str(field.contents()).startswith(start)


def test_llama_3_rope_factors_match_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = make_model(tmp_path / "base", rope_parameters=LLAMA3_ROPE, max_position_embeddings=512)
    architecture = read_architecture(base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](architecture.config, torch.device("cpu"))
    plain = 10_000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = architecture.rope_factors()
    assert factors is not None
    assert torch.allclose(plain / torch.tensor(factors), scaled, rtol=1e-4)
    assert max(factors) == 8
    assert min(factors) == 1


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gemma3_text"}, "models of type 'gemma3_text'"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding-window attention"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "uses 'linear' RoPE scaling"),
    ],
)
def test_model_for_which_llama_cpp_would_compute_different_outputs_is_rejected(
    tmp_path: Path, config: dict[str, object], told: str
) -> None:
    base = make_model(tmp_path / "base")
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(TrainingError, match=told) as caught:
        read_architecture(base)
    assert "convert_hf_to_gguf.py" in caught.value.todo


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"query_pre_attn_scalar": 144}, "has query_pre_attn_scalar 144"),
        ({"final_logit_softcapping": None}, "does not cap its logits"),
        ({"layer_types": ["sliding_attention"] * 4}, "full attention in every second layer"),
        ({"use_bidirectional_attention": True}, "has bidirectional attention"),
    ],
)
def test_gemma_config_that_differs_from_the_published_gemma_models_is_rejected(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    AutoConfig.for_model("gemma2", **GEMMA | changes).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match=told) as caught:
        read_architecture(tmp_path)
    assert "convert_hf_to_gguf.py" in caught.value.todo


def test_mixture_of_experts_is_rejected_for_gguf(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="models of type 'mixtral'"):
        read_architecture(write_mixture(tmp_path / "base", "mixtral"))


@pytest.mark.slow
def test_gguf_file_is_deleted_if_its_contents_differ_from_the_model(
    tiny_base: Path, tmp_path: Path, examples: list[ChatExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = iter([2, 2, 2, 2])  # queries and keys of two layers; read again, they have their own size
    monkeypatch.setattr(module, "permute", lambda rows, heads: rows * next(written, 1))
    with pytest.raises(TrainingError, match=r"blk\.\d\.attn_[qk]\.weight changed by 1\.0"):
        export_gguf(tiny_base, tmp_path / "out", "tiny", examples)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_modelfile_is_written_unless_disabled(tiny_base: Path, tmp_path: Path, examples: list[ChatExample]) -> None:
    for wanted in (True, False):
        export_gguf(tiny_base, tmp_path / str(wanted), "tiny", examples, modelfile=wanted)
        assert (tmp_path / str(wanted) / MODELFILE).exists() is wanted
