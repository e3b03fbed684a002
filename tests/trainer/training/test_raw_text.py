"""Tests training on documents, with a base that has no chat template."""

from itertools import chain
from pathlib import Path
from statistics import fmean

import pytest

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from tests.trainer.conftest import losses_of, make_model, make_recipe, make_tokenizer
from trainer.base_model.other_template import folder_with_template
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_turns
from trainer.data.length import cut_documents
from trainer.data.template_choice import template_text
from trainer.recipe.named_template import NamedTemplate
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def documents() -> list[ChatExample]:
    """Return real texts: the sections of this project's pages."""
    pages = [read_examples(path)[0].question for path in sorted((ROOT / "docs").glob("*.md"))[:4]]
    return [ChatExample.of_document(part[:1500]) for page in pages for part in page.split("\n## ")][:24]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base without a chat template, as `objective: text` uses it."""
    folder = tmp_path_factory.mktemp("raw")
    make_model(folder / "base")
    make_tokenizer(chat_template="").save_pretrained(folder / "base")
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    return folder_with_template(folder / "base", template_text(NamedTemplate.TEXT, folder / "base"), folder / "cache")


def test_every_token_of_a_document_and_its_end_token_are_trained_on_exactly_once(
    base: Path, documents: list[ChatExample]
) -> None:
    tokenizer = load_tokenizer(base)
    stops = stop_tokens(base, tokenizer)
    for document, rows in zip(
        documents, cut_documents(tokenize_turns(tokenizer, documents, stops, {}), 100), strict=True
    ):
        assert all(1 < len(row.input_ids) <= 100 and row.learnt == ((1, len(row.input_ids)),) for row in rows)
        assert {row.input_ids[0] for row in rows} == {tokenizer.eos_token_id}
        learnt = list(chain.from_iterable(row.answer for row in rows))
        assert learnt == [*tokenizer(document.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("packing", [False, True])
def test_training_on_documents_lowers_the_loss_on_heldout_documents(
    packing: bool, base: Path, documents: list[ChatExample], tmp_path: Path
) -> None:
    train = {"batch_size": 4, "packing": packing, "max_length": 256, "learning_rate": 1e-2, "epochs": 3}
    recipe = make_recipe(objective="text", train=train, stopping={"every_steps": 8})
    data = TrainingData(documents[:20], documents[20:])
    adapter = tmp_path / "adapter"
    summary = train_model(base, data, recipe, adapter, tmp_path / "checkpoints", number_type=NumberType.FLOAT32)
    losses, heldout = losses_of(summary), [point.heldout_loss for point in summary.points if point.heldout_loss]
    assert fmean(losses[-5:]) < fmean(losses[:5]) - 0.1
    assert heldout[-1] < heldout[0] - 0.1
