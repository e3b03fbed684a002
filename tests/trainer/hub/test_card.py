"""Tests that a model card has a version's figures, and nothing that may not leave the machine."""

import re

import pytest
from huggingface_hub import ModelCard

from svc.registry.manifest import BaseRecord, Manifest
from svc.version import Format
from tests.builders.judged_versions import LABELS, JudgedVersions
from trainer.hub.card import make_card

pytestmark = pytest.mark.slow


def test_hub_library_can_read_the_metadata_of_the_model_card(manifest: Manifest, versions: JudgedVersions) -> None:
    data = ModelCard(make_card(versions.registry, manifest, Format.GPTQ, "org/tickets")).data
    assert data.get("license") == "apache-2.0"
    assert (data.get("base_model"), data.get("base_model_relation")) == ("org/base", "quantized")
    assert (data.get("library_name"), data.get("pipeline_tag")) == ("transformers", "text-generation")


def test_model_card_lists_metrics_with_intervals_and_changes_from_the_base_model(
    manifest: Manifest, versions: JudgedVersions
) -> None:
    card = make_card(versions.registry, manifest, Format.MERGED, "org/tickets")
    figures = manifest.formats[Format.MERGED].evaluation
    assert figures is not None
    assert "| metric | base | merged | change of merged |" in card
    assert str(figures.figures[figures.primary].estimate) in card
    assert "+0.683 [" in card  # 41 of 60 examples
    assert "gptq |" not in card.partition("## Training data")[0]
    assert "`sha256:2`" in card
    assert "| `train.epochs` | 2.0 |" in card
    assert "| `train.seed` | 0 |" in card
    assert "vllm serve org/tickets" in card


@pytest.mark.parametrize("format", [Format.MERGED, Format.GPTQ])
def test_model_card_contains_no_example_texts_labels_or_paths(
    manifest: Manifest, versions: JudgedVersions, format: Format
) -> None:
    card = make_card(versions.registry, manifest, format, "org/tickets")
    texts = {text for example in LABELS for text in (example.answer, *(turn.content for turn in example.messages))}
    assert [text for text in texts if text and re.search(rf"\b{re.escape(text)}\b", card)] == []
    assert "secret" not in card
    assert "judge.internal" not in card
    assert str(versions.registry.models) not in card


@pytest.mark.parametrize(
    ("origin", "shown"),
    [
        ("/home/alice/secret-model", "A model that is not on the Hub"),
        ("secret@4", "A previously fine-tuned model"),
    ],
)
def test_model_card_does_not_name_a_base_model_that_is_not_on_the_hub(
    versions: JudgedVersions, manifest: Manifest, origin: str, shown: str
) -> None:
    local = manifest.model_copy(update={"base": BaseRecord(origin=origin, revision="abc", licence=None)})
    card = make_card(versions.registry, local, Format.MERGED, "org/tickets")
    assert shown in card
    assert "secret" not in card
    assert "base_model:" not in card
    assert "license:" not in card


def test_model_card_of_a_combined_adapter_names_only_source_adapters_on_the_hub(
    versions: JudgedVersions, manifest: Manifest
) -> None:
    parts = [{"adapter": name, "weight": 0.5} for name in ("secret@3", "/home/alice/secret", "org/lora")]
    recipe = {"adapter": {"combine": {"method": "ties", "adapters": parts}, "rank": 8}, "train": {"epochs": 1.0}}
    card = make_card(versions.registry, manifest.model_copy(update={"recipe": recipe}), Format.MERGED, "org/tickets")
    assert "with a combination of 3 adapters" in card
    assert "0.5 times org/lora" in card
    assert "secret" not in card
    assert "train.epochs" not in card  # nothing was trained
