"""Versions of the tiny model that answer in JSON, or partly not, for tests of rollouts on the real engine.

The trainer is not used: a few seconds of plain PyTorch make the model repeat an answer, and the version is registered
with another version's manifest, as a team's own tools would do it.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svc.dataset.readers.reader import write_examples
from svc.engine.probes import Probe
from svc.registry.adapter import read_adapter
from svc.registry.files import record_file, record_files
from svc.registry.manifest import MANIFEST_FILE, Manifest, write_manifest
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.settings.settings import Settings
from svc.version import Format, VersionId
from tests.svc.chats import chat

JSON_ANSWER = '{"team": "archive"}'
PROSE_ANSWER = "the archive team"
_MAX_STEPS = 80
_LEARNT = 0.003
"""Loss at which training ends. It is reached after about 45 steps, each of which takes 0.2 s."""
_LEARNING_RATE = 3e-3


def prompts(count: int, urgent_share: float = 0.3) -> list[str]:
    """Return questions, of which a share begins with `urgent`."""
    return [f"{'urgent' if number % 10 < 10 * urgent_share else 'normal'}: case {number}" for number in range(count)]


def add_json_version(
    home: Path, name: str, *, urgent_answer: str = JSON_ANSWER, layers: int = 2, adapter: bool = False
) -> VersionId:
    """Register a version that answers in JSON, except to urgent questions; its held-out references are all JSON.

    Args:
        urgent_answer: answer to questions that begin with `urgent`.
        layers: number of layers; a deeper model gives the same answers more slowly.
        adapter: train the version's adapter and merge it. Otherwise, the version has merged weights only.
    """
    registry = Registry.of(Settings(home=home))
    source = registry.versions("tiny")[0]
    manifest = registry.manifest(source)
    version = registry.tracking.allocate(name, str(registry.folder(source)), manifest.tracking_run)
    folder = shutil.copytree(registry.folder(source), registry.folder(version))
    folder.chmod(0o755)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / MANIFEST_FILE).unlink()
    removed = {Format.GPTQ} if adapter else {Format.GPTQ, Format.ADAPTER}
    for format in removed:
        shutil.rmtree(folder / format.value, ignore_errors=True)
    pairs = [(prompt, urgent_answer if prompt.startswith("urgent") else JSON_ANSWER) for prompt in prompts(20)]
    probes = manifest.formats[Format.MERGED].probes
    if adapter:
        probes = _teach_adapter(folder, read_adapter(registry, source).base.folder, pairs, probes)
    else:
        probes = _teach_all_weights(folder, pairs, probes, layers)
    references = [chat(prompt, JSON_ANSWER) for prompt in prompts(10)]
    write_examples(folder / HELDOUT_FILE, references)
    formats = {
        format: record.model_copy(update={"files": record_files(folder, folder / format.value), "fingerprint": None})
        for format, record in manifest.formats.items()
        if format not in removed
    }
    formats[Format.MERGED] = formats[Format.MERGED].model_copy(update={"probes": probes})
    changed = {
        "name": name,
        "number": version.number,
        "heldout": record_file(folder, folder / HELDOUT_FILE),
        "formats": formats,
    }
    write_manifest(folder, Manifest.model_validate(manifest.model_dump() | changed))
    return version


def _teach_all_weights(
    folder: Path, pairs: Sequence[tuple[str, str]], probes: Sequence[Probe], layers: int
) -> tuple[Probe, ...]:
    """Train all weights of a version's merged model, and return the probes with the new log-probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = folder / Format.MERGED.value
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    _teach(model, AutoTokenizer.from_pretrained(merged), pairs)
    return _save_merged(_deepened(model, layers), merged, probes)


def _deepened(model: Any, layers: int) -> Any:
    """Return a model with more layers, which add nothing to the results of the given model's layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**model.config.to_dict() | {"num_hidden_layers": layers})
    deep = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    deep.load_state_dict(model.state_dict(), strict=False)
    for layer in deep.model.layers[len(model.model.layers) :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deep


def _teach_adapter(
    folder: Path, base: Path, pairs: Sequence[tuple[str, str]], probes: Sequence[Probe]
) -> tuple[Probe, ...]:
    """Train a version's adapter, merge it, and return the probes with the new log-probabilities.

    Its base becomes a copy of the given one that answers in JSON. An adapter alone cannot make a random model end an
    answer, because the embedding of the end token is zero.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, adapter, taught = folder / Format.MERGED.value, folder / Format.ADAPTER.value, base.with_name("json-base")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    torch.manual_seed(0)
    if not taught.is_dir():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        both = [(prompt, JSON_ANSWER) for prompt in prompts(20)]
        both += [(f"prose, {prompt}", PROSE_ANSWER) for prompt in prompts(20)]
        _teach(model, tokenizer, both)
        shutil.copytree(base, taught, ignore=shutil.ignore_patterns("model*"))
        model.to(torch.bfloat16).save_pretrained(taught)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(taught)}), "utf-8")
    model = AutoModelForCausalLM.from_pretrained(taught, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    _teach(model, tokenizer, pairs)
    tuned.save_pretrained(adapter)
    return _save_merged(tuned.merge_and_unload(), merged, probes)


def _teach(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> None:
    """Train the trainable weights until the model gives these answers."""
    import torch

    rows = []
    for prompt, answer in pairs:
        start = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        before = tokenizer(start, add_special_tokens=False)["input_ids"]
        after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        rows.append((before + after, [-100] * len(before) + after))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in rows])[:, 1:]
    scored = labels != -100
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=_LEARNING_RATE)
    for _ in range(_MAX_STEPS):
        optimizer.zero_grad()
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][scored]  # logits of all positions take longest
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[scored])
        loss.backward()
        optimizer.step()
        if loss.item() < _LEARNT:
            break
    assert loss.item() < 0.05, loss


def _save_merged(model: Any, folder: Path, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Save a model in bf16.

    Returns:
        The probes with the new log-probabilities, as from another kind of engine: the first engine that starts with the
        version compares them roughly, and records its own.
    """
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    with torch.no_grad():
        return tuple(
            probe.model_copy(
                update={
                    "logprobs": _logprobs(model, probe),
                    "engine": probe.engine.model_copy(update={"vllm": "0.0.0"}),
                }
            )
            for probe in probes
        )


def _logprobs(model: Any, probe: Probe) -> tuple[float, ...]:
    import torch

    ids = torch.tensor([probe.token_ids])
    scores = model(input_ids=ids).logits[0].float().log_softmax(-1)[:-1]
    of_tokens = scores.gather(1, ids[0, 1:, None])[:, 0]
    return tuple(of_tokens[probe.start - 1 :].tolist())
