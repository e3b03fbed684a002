"""Tests that a version trained on documents is evaluated by perplexity alone, registered and read again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.version import Format
from tests.trainer.pipeline.stand_ins import Make
from trainer.data.fingerprint import fingerprint
from trainer.pipeline import evaluation as evaluation_module
from trainer.pipeline.examples import Examples

TRAINED = tuple(ChatExample.of_document(f"Chapter {number}: call me number {number}.") for number in range(6))
HELD = (
    ChatExample.of_document("It was the best of times."),
    ChatExample.of_document("It was the worst of times, too."),
)


def tokenize(folder: Path, examples: Sequence[ChatExample], kwargs: Any) -> list[TokenizedExample]:
    lengths = [len(example.answer) for example in examples]
    return [TokenizedExample(tuple(range(1, length)), ((1, length - 1),)) for length in lengths]


@pytest.mark.slow
def test_version_trained_on_documents_is_evaluated_by_perplexity_and_registered(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_module, "tokenize_as_trained", tokenize)
    pipeline = make(HELD, objective="text", formats=["merged"], train={"max_length": 16})
    prints = fingerprint(TRAINED), fingerprint(HELD)
    pipeline = replace(pipeline, examples=Examples(TRAINED, HELD, *prints, (*TRAINED, *HELD)))
    version = pipeline.train_version()
    manifest = pipeline.registry.manifest(version)
    merged, base = manifest.formats[Format.MERGED].evaluation, manifest.base_evaluation
    assert merged and base
    assert list(merged.metrics) == list(base.metrics) == ["perplexity"]
    assert [len(row.input_ids) for row in pipeline._evaluation.tokenized] == [16, 16]
    assert pipeline.registry.heldout(version) == list(HELD)
