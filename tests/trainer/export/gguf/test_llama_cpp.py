"""Tests GGUF files in llama.cpp: the token ids of real texts, and the answers to real prompts."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from tests.builders.gguf_models import GEMMA, TEXTS
from tests.hub_models.tokenizer import smollm2_folder
from trainer.data.chat_template import load_tokenizer
from trainer.data.template_choice import template_text
from trainer.export.gguf import k_quants
from trainer.export.gguf.k_quants import KQuant, export_k_quant
from trainer.export.gguf.writer import GgufType, export_gguf, render_examples
from trainer.recipe.named_template import NamedTemplate

pytestmark = [pytest.mark.matrix, pytest.mark.slow]

ROOT = Path(__file__).parents[4]
MODULES = ROOT / ".venv" / "llama-cpp" / "node_modules"
PACKAGE = MODULES / "node-llama-cpp" / "dist" / "index.js"
LIBRARIES = MODULES / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
EXAMPLES = read_examples(ROOT / "examples" / "debian-triage" / "heldout.jsonl")[:100]
PROMPTS, TOKENS = 12, 12
LLAMA_2 = ROOT / ".venv" / "tokenizers" / "tokenizer-llama2"
GEMMA_3 = ROOT / ".venv" / "tokenizers" / "tokenizer-gemma3"


def run_llama_cpp(model: Path, texts: list[str], prompts: list[str]) -> Any:
    """Return llama.cpp's token ids of the texts and its greedy answers to the prompts."""
    if not PACKAGE.is_file():
        pytest.skip("npm could not fetch llama.cpp")
    result = model.with_suffix(".json")
    job = {"package": str(PACKAGE), "model": str(model), "texts": texts, "prompts": prompts, "tokens": TOKENS}
    command = ["node", str(Path(__file__).with_name("llama_cpp.mjs"))]
    subprocess.run(command, input=json.dumps(job | {"result": str(result)}), text=True, check=True)
    return json.loads(result.read_text("utf-8"))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `llama-quantize` on PATH that runs llama.cpp's own function."""
    if not LIBRARIES.is_dir():
        pytest.skip("npm could not fetch llama.cpp")
    script = tmp_path / "bin" / k_quants.TOOL
    script.parent.mkdir()
    own = Path(__file__).with_name("llama_quantize.py")
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{own}" "{LIBRARIES}" "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize("type", KQuant)
def test_llama_cpp_runs_exported_k_quant_files_and_some_answers_equal_those_of_transformers(
    tmp_path: Path, type: KQuant
) -> None:
    base = smollm2_folder()
    done = export_k_quant(base, tmp_path / "out", "smol", EXAMPLES, type)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"Modelfile", done.file.name}
    # Of Q4_K_M, 4 of 12 answers were the same. A wrong order of rows changes every answer.
    check(base, done.file, 0.15)


def test_llama_cpp_tokenizes_llama_2_conversations_like_transformers(tmp_path: Path) -> None:
    if not LLAMA_2.is_dir():
        pytest.skip("npm could not fetch the tokenizer of Llama 2")
    tokenizer = AutoTokenizer.from_pretrained(LLAMA_2)
    tokenizer.chat_template = template_text(NamedTemplate.LLAMA_2, LLAMA_2)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **shape))
    model.bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = export_gguf(tmp_path / "base", tmp_path, "tiny", EXAMPLES, type=GgufType.F16, modelfile=False).file
    loaded = load_tokenizer(tmp_path / "base")
    texts = [*render_examples(loaded, {}, EXAMPLES), *(f"<s>{text}" for text in TEXTS)]
    found = run_llama_cpp(file, texts, [])["texts"]
    assert found == [loaded(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_llama_cpp_tokenizes_and_answers_like_transformers_for_gemma(tmp_path: Path) -> None:
    """The random Gemma 2 has the tokenizer of Gemma 3, and prompts are longer than its window."""
    if not GEMMA_3.is_dir():
        pytest.skip("npm could not fetch the tokenizer of Gemma 3")
    tokenizer = AutoTokenizer.from_pretrained(GEMMA_3)
    shape = GEMMA | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", vocab_size=262_144, **shape))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if "norm" in name else 0.08)  # other than the 0 of a new norm
    model.bfloat16().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    file = export_gguf(tmp_path / "base", tmp_path, "tiny", EXAMPLES[:20], type=GgufType.F16, modelfile=False).file
    check(tmp_path / "base", file, 0.9, EXAMPLES[:20])


@pytest.mark.parametrize("type", GgufType)
def test_llama_cpp_tokenizes_and_answers_like_transformers_for_smollm2(tmp_path: Path, type: GgufType) -> None:
    base = smollm2_folder()
    file = export_gguf(base, tmp_path, "smol", EXAMPLES, type=type).file
    # Two tokens are nearly equally likely now and then. A wrong order of rows changes every answer.
    check(base, file, 0.9 if type is GgufType.F16 else 0.7)


def check(base: Path, file: Path, least: float, examples: Sequence[ChatExample] = EXAMPLES) -> None:
    """Check in llama.cpp that a file has the base's token ids, and at least a share of transformers' answers."""
    tokenizer = load_tokenizer(base)
    texts = [*render_examples(tokenizer, {}, examples), *TEXTS]
    turns = [[message.as_dict() for message in example.prompt] for example in examples[:PROMPTS]]
    prompts = [str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) for turn in turns]
    found = run_llama_cpp(file, texts, prompts)
    assert found["texts"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    same = 0
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        expected = [token for token in whole[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        same += answer == expected
    print(f"{file.name}: {same} of {PROMPTS} answers")
    assert same >= PROMPTS * least
