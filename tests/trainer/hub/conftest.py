"""Fixtures for a version that was evaluated, and a server in place of the Hugging Face Hub."""

from collections.abc import Iterator

import pytest

from svc.registry.manifest import BaseRecord, Manifest
from svc.registry.registry import Registry
from tests.builders.judged_versions import LABELS, JudgedVersions, right
from tests.trainer.hub.hub_server import TOKEN, HubServer, hub_server
from tests.trainer.report.conftest import run, versions
from trainer.report.judged import BASE

__all__ = ["run", "versions"]

RECIPE = {
    "name": "tickets",
    "base": "org/base",
    "method": "lora",
    "objective": "sft",
    "data": {"train": ["/home/alice/secret/train.jsonl"]},
    "adapter": {"rank": 16, "targets": ["q_proj", "v_proj"], "rslora": False, "trained": None},
    "train": {"epochs": 2.0, "seed": 0, "learning_rate": 0.0005},
    "evaluate": {"metrics": ["/home/alice/secret/metric.py:score"]},
    "judge": {"url": "http://judge.internal:8000"},
}


@pytest.fixture
def manifest(versions: JudgedVersions, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Return the manifest of a version in the registry that commands use."""
    monkeypatch.setattr(Registry, "of", lambda settings: versions.registry)
    base = BaseRecord(origin="org/base", revision="abc", licence="Apache-2.0")
    answers = {BASE: right(LABELS, 9), "merged": right(LABELS, 50), "gptq": right(LABELS, 48)}
    return versions.publish(LABELS, answers, base=base, recipe=RECIPE)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Return a server that the real huggingface_hub takes for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
