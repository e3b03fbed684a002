"""Tests that two models are asked the same examples on the engine, except for stored answers."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.probes import EngineFacts, engine_facts
from svc.errors import BaseModelError, BusyError, DataError, EngineError, NotFoundError
from svc.evaluation.endpoint import Endpoint
from svc.files.lock import hold_lock
from svc.model_folder.chat_template import TemplateKwargs, read_chat_template
from svc.registry.files import record_files
from svc.registry.manifest import write_manifest
from svc.registry.registry import REFERENCE_FOLDER, Registry
from svc.settings.engine import Device, EngineSettings
from svc.settings.settings import Settings
from svc.version import Alias, Format, VersionId
from tests.serving.engine_double import EngineDouble, tokenized
from tests.serving.versions import HELDOUT, NAME, AliasBook, make_version
from tests.svc.chats import chat
from tests.svc.engine.devices import AVX512
from tests.svc.evaluation.judge_server import judge_server
from tests.trainer.engines import Engines
from trainer.base_model.content import hash_files, model_files
from trainer.base_model.other_template import revision_with_template
from trainer.evaluation.comparison.job import FOLDER, Compared, ComparisonJob, Wanted
from trainer.evaluation.comparison.model import LocalModel, asked_alike, find_model
from trainer.evaluation.comparison.render import everything, print_compared
from trainer.evaluation.qualification import Qualifier
from trainer.recipe.evaluate import Evaluate, Qualify


class Bench:
    """A home with versions 1 and 2, each of which answers the question with its number, and their engines."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder / "home", engine=EngineSettings(device=Device.CPU))
        self.book = AliasBook()
        self.registry = Registry(self.settings.home / "models", self.book)
        self.engines = Engines()
        self.engines.change = self._name_answers
        self.provider: httpx.MockTransport | None = None
        for number in (1, 2):
            make_version(self.registry, number)

    def compare(self, first: str, second: str, **options: Any) -> Compared:
        wanted = Wanted(first, second, **options)
        parts = (self.settings, wanted, self.registry, AVX512, self._launch, _tokenize, self.provider)
        return ComparisonJob(*parts).run()

    def change(self, number: int, **changes: Any) -> None:
        """Change a version's manifest and record the files added to its reference folder."""
        version = VersionId(NAME, number)
        folder = self.registry.folder(version)
        reference = record_files(folder, folder / REFERENCE_FOLDER)
        write_manifest(folder, self.registry.manifest(version).model_copy(update={"reference": reference} | changes))

    def _launch(self, folder: Path, *, template_kwargs: TemplateKwargs) -> Any:
        return self.engines(folder)

    def _name_answers(self, number: int, double: EngineDouble) -> None:
        double.label = lambda folder: Path(folder).parent.name


def _no_facts(folder: Path) -> EngineFacts:
    raise AssertionError("nothing is measured")


def _tokenize(folder: Path, examples: Sequence[ChatExample], kwargs: TemplateKwargs) -> list[TokenizedExample]:
    return list(map(tokenized, examples))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def yes(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]})


def test_compared_models_run_in_one_engine_and_each_answers_with_its_own_weights(bench: Bench) -> None:
    compared = bench.compare("tuned@1", "tuned@2", metrics=["exact_match"])
    tally = compared.comparison.tally
    assert (tally.wins, tally.losses, tally.ties) == (1, 1, 1)
    assert [[result.hit for result in answers.results] for answers in compared.answers] == [
        [True, False, False],
        [False, True, False],
    ]
    assert len(bench.engines.launched) == 1
    assert bench.engines.running == 0


@pytest.mark.slow
def test_second_engine_is_started_for_a_model_that_cannot_be_loaded_in_place(bench: Bench) -> None:
    make_version(bench.registry, 3, width=8)
    bench.compare("tuned@1", "tuned@3")
    assert len(bench.engines.launched) == 2
    assert bench.engines.running == 0


@pytest.mark.slow
def test_cached_answers_are_used_unless_the_fresh_option_is_set(bench: Bench) -> None:
    first = bench.compare("tuned@1", "tuned@2")
    again = bench.compare("tuned@2", "tuned@1")
    assert len(bench.engines.launched) == 1
    assert [answers.kept for answers in first.answers] == [False, False]
    assert [answers.kept for answers in again.answers] == [True, True]
    assert again.answers[0].results == first.answers[1].results
    fresh = bench.compare("tuned@1", "tuned@2", fresh=True)
    assert [answers.kept for answers in fresh.answers] == [False, False]
    assert len(bench.engines.launched) == 2


def registered(bench: Bench) -> None:
    """Give version 3 answers stored at registration, from the same engine kind as in this test."""
    folder = bench.registry.artifact(VersionId(NAME, 1), Format.MERGED)
    facts = engine_facts(bench.settings.engine, AVX512, folder)
    make_version(bench.registry, 3, answered=3, facts=facts)


@pytest.mark.slow
def test_answers_stored_at_registration_are_reused(bench: Bench) -> None:
    registered(bench)
    compared = bench.compare("tuned@3", "tuned@1")
    assert [answers.kept for answers in compared.answers] == [True, False]
    assert {result.answer for result in compared.answers[0].results} == {"a"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_tokens": 2}, {"fresh": True}, {"data": ["other.jsonl"]}], ids=str)
def test_answers_stored_at_registration_are_not_reused_if_comparison_options_require_new_answers(
    bench: Bench, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_examples(tmp_path / "other.jsonl", [HELDOUT[0], chat("another one")])
    registered(bench)
    assert not bench.compare("tuned@3", "tuned@1", **options).answers[0].kept


def test_answers_stored_at_registration_are_not_reused_for_a_different_engine_kind(bench: Bench) -> None:
    make_version(bench.registry, 3, answered=3)
    assert not bench.compare("tuned@3", "tuned@1").answers[0].kept


def test_answer_limits_equal_the_training_defaults_when_no_recipe_sets_a_limit(bench: Bench) -> None:
    for number in (1, 2):
        bench.change(number, recipe={})
    compared = bench.compare("tuned@1", "tuned@2")
    seen = list(map(tokenized, HELDOUT))
    qualifier = Qualifier(bench.engines, _no_facts, Evaluate(), Qualify(), HELDOUT, seen, seen, context=2048)
    for answers in compared.answers:
        assert tuple(result.limit for result in answers.results) == qualifier.limits
    bodies = [body for body in bench.engines.launched[0].double.requests if "messages" in body]
    assert {body["max_tokens"] for body in bodies} == set(qualifier.limits)


def test_answer_limits_are_reduced_to_fit_a_short_context(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"engine": EngineSettings(device=Device.CPU, max_model_len=16)})
    bench.change(1, recipe={})
    results = bench.compare("tuned@1", "tuned@2").answers[0].results
    prompts = [len(tokenized(example).prompt) for example in HELDOUT]
    assert [result.limit for result in results] == [16 - prompt for prompt in prompts]


def test_answers_stored_at_registration_are_not_reused_when_the_token_limit_differs(bench: Bench) -> None:
    registered(bench)
    bench.change(3, recipe={})
    compared = bench.compare("tuned@3", "tuned@1")
    assert [answers.kept for answers in compared.answers] == [False, False]


def test_bare_name_selects_the_production_version(bench: Bench) -> None:
    bench.book.set_alias(VersionId(NAME, 1), Alias.PRODUCTION)
    compared = bench.compare("tuned", "tuned@2", limit=1)
    assert [result.hit for answers in compared.answers for result in answers.results] == [True, False]


@pytest.mark.slow
def test_version_is_compared_in_its_served_format_unless_another_format_is_specified(bench: Bench) -> None:
    make_version(bench.registry, 3, formats=(Format.MERGED, Format.GPTQ))
    served = everything(bench.compare("tuned@3", "tuned@3"))
    merged = everything(bench.compare("tuned@3", "tuned@3", format="merged"))
    assert served["a"]["name"] == "tuned@3 (gptq)"
    assert merged["a"]["name"] == "tuned@3 (merged)"
    with pytest.raises(NotFoundError, match="tuned@1 has no format gptq"):
        bench.compare("tuned@3", "tuned@1", format="gptq")


def test_data_option_is_required_when_versions_have_different_heldout_sets(bench: Bench, tmp_path: Path) -> None:
    data = bench.registry.manifest(VersionId(NAME, 2)).data.model_copy(update={"heldout_fingerprint": "other"})
    bench.change(2, data=data)
    with pytest.raises(DataError, match="tuned@1 and tuned@2 have different held-out sets"):
        bench.compare("tuned@1", "tuned@2")
    write_examples(tmp_path / "data.jsonl", HELDOUT[:2])
    assert bench.compare("tuned@1", "tuned@2", data=[str(tmp_path / "data.jsonl")]).comparison.examples == 2


@pytest.mark.parametrize("limit", [None, 1])
def test_choice_of_metrics_depends_on_all_examples_even_if_only_some_are_evaluated(
    bench: Bench, tmp_path: Path, limit: int | None
) -> None:
    labels = [chat(f"is {number} even?", "yes" if number % 2 == 0 else "no") for number in range(8)]
    write_examples(tmp_path / "labels.jsonl", labels)
    compared = bench.compare("tuned@1", "tuned@2", data=[str(tmp_path / "labels.jsonl")], limit=limit)
    assert compared.comparison.primary == "accuracy"


@pytest.mark.parametrize(("learnt", "warning"), [(HELDOUT[:2], "trained on 2 of 3 prompts"), ((), None)])
def test_warning_is_printed_when_a_compared_version_was_trained_on_the_comparison_prompts(
    bench: Bench, learnt: Sequence[ChatExample], warning: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, prompts in ((1, ()), (2, learnt)):
        folder = bench.registry.folder(VersionId(NAME, number)) / REFERENCE_FOLDER
        write_prompt_hashes(folder / TRAINED_PROMPTS_FILE, hash_prompts(prompts))
        bench.change(number)
    bench.compare("tuned@1", "tuned@2")
    err = capsys.readouterr().err
    assert f"tuned@2 (merged) was {warning}" in err if warning else "prompts" not in err


def test_contamination_warning_includes_prompts_that_the_base_version_was_trained_on(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, prompts in ((1, HELDOUT[:1]), (2, HELDOUT[1:2])):
        folder = bench.registry.folder(VersionId(NAME, number)) / REFERENCE_FOLDER
        write_prompt_hashes(folder / TRAINED_PROMPTS_FILE, hash_prompts(prompts))
        bench.change(number)
    base = bench.registry.manifest(VersionId(NAME, 2)).base.model_copy(update={"origin": "tuned@1"})
    bench.change(2, base=base)
    bench.compare("tuned@1", "tuned@2")
    err = capsys.readouterr().err
    assert "tuned@1 (merged) was trained on 1 of 3" in err
    assert "tuned@2 (merged) was trained on 2 of 3" in err


def test_notice_is_printed_before_prompts_are_sent_to_an_endpoint(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    messages: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        messages.append(capsys.readouterr().err)
        return yes(request)

    bench.provider = httpx.MockTransport(answer)
    compared = bench.compare("tuned@1", "https://host.example/v1#big", key="sk-secret")
    assert "the prompts of 3 examples will be sent to https://host.example/v1" in messages[0]
    assert set(compared.comparison.left_out) == {"perplexity", "length", "nll"}
    assert {result.answer for result in compared.answers[1].results} == {"yes"}
    content = everything(compared)
    assert "nll" not in content["answers"][0]["a"]
    assert "sk-secret" not in json.dumps(content)


def test_answer_length_limits_are_the_same_for_a_local_model_and_an_external_endpoint(bench: Bench) -> None:
    bench.provider = httpx.MockTransport(yes)
    bench.change(1, recipe={})
    local, elsewhere = bench.compare("tuned@1", "https://host.example/v1#big").answers
    assert [result.limit for result in elsewhere.results] == [result.limit for result in local.results]


def test_answer_limit_is_derived_from_reference_length_in_bytes_when_neither_compared_model_is_local(
    bench: Bench, tmp_path: Path
) -> None:
    bench.provider = httpx.MockTransport(yes)
    write_examples(tmp_path / "data.jsonl", [chat("one", "äöü"), chat("two", "abc")])
    compared = bench.compare(
        "https://host.example/v1#big", "https://host.example/v1#small", data=[str(tmp_path / "data.jsonl")]
    )
    for answers in compared.answers:
        assert [result.limit for result in answers.results] == [25, 21]


def test_data_option_is_required_when_neither_compared_model_has_a_heldout_set(bench: Bench) -> None:
    with pytest.raises(DataError, match="neither model has a held-out set"):
        bench.compare("https://host.example/v1#big", "https://host.example/v1#small")


def test_token_metrics_are_excluded_for_models_with_different_tokenizers(bench: Bench) -> None:
    other = make_version(bench.registry, 3)
    folder = bench.registry.folder(other)
    (folder / "merged" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    record = bench.registry.manifest(other).formats[Format.MERGED]
    files = {"files": record_files(folder, folder / "merged")}
    bench.change(3, formats={Format.MERGED: record.model_copy(update=files)})
    left_out = bench.compare("tuned@1", "tuned@3").comparison.left_out
    assert left_out == dict.fromkeys(("perplexity", "length", "nll"), "the two models have different tokenizers")


def test_failed_comparison_leaves_no_engine_running(bench: Bench) -> None:
    bench.engines.change = lambda number, double: setattr(double, "refuse_with", (500, {"message": "no"}))
    with pytest.raises(EngineError, match="with status 500"):
        bench.compare("tuned@1", "tuned@2")
    assert bench.engines.running == 0


@pytest.mark.slow
def test_only_one_comparison_runs_at_a_time(bench: Bench) -> None:
    with hold_lock(bench.settings.home / FOLDER / "lock", "it"), pytest.raises(BusyError, match="svc compare"):
        bench.compare("tuned@1", "tuned@2")


def test_error_for_an_unknown_name_lists_known_models(bench: Bench) -> None:
    with pytest.raises(NotFoundError, match="'tunde' is not a version, a base model or an endpoint") as raised:
        bench.compare("tunde", "tuned@2")
    assert "a version of tuned" in raised.value.expected
    assert "smollm2-135m-instruct" in raised.value.expected


def test_printed_comparison_includes_metrics_and_verdict_and_answers(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = bench.compare("tuned@1", "tuned@2", metrics=["exact_match"])
    capsys.readouterr()
    print_compared(compared)
    out = " ".join(capsys.readouterr().out.split())
    for text in (
        "A tuned@1 (merged)",
        "3 examples from the held-out set of tuned@1, answers of at most 3 tokens",
        "exact match 0.333 [0.061, 0.792] 0.333 [0.061, 0.792] 0.000 [-1.000, 1.000]",
        "cut off at the limit 1.000 [0.439, 1.000] 1.000 [0.439, 1.000] 0.000 [0.000, 0.000]",
        "By exact match: no significant difference",
        "B wins 1, loses 1, ties 1; sign test p = 1",
        "The 3 examples whose answers differ most, ranked by exact_match and then by the number of edits between them:",
        "1 A by 1 exact_match, 3 edits asked question 1 right 1.0 1.1 1.2 A 1.0 1.1 1.2 B 2.0 2.1 2.2",
    ):
        assert text in out


@pytest.mark.slow
def test_printed_comparison_explains_length_limits_derived_from_references(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.change(1, recipe={})
    compared = bench.compare("tuned@1", "tuned@2")
    capsys.readouterr()
    print_compared(compared)
    out = " ".join(capsys.readouterr().out.split())
    assert "answers of at most 1.5 times the length of their reference plus 16 tokens" in out


@pytest.mark.slow
def test_configured_judge_compares_the_answers(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def prefer_two(first: str, second: str) -> str:
        return "A" if first.startswith("2") else "B"

    with judge_server(prefer_two) as server:
        judge = Endpoint(server.url, "judge-model")
        compared = bench.compare("tuned@1", "tuned@2", judge=judge)
    assert compared.judge is not None
    assert (compared.judge.win_rate.value, compared.judge.agreement.value) == (1, 1)
    assert everything(compared)["judge"]["model"] == "judge-model"
    capsys.readouterr()
    print_compared(compared)
    assert "Judge judge-model at http://127.0.0.1" in capsys.readouterr().out


def test_base_without_a_chat_template_uses_the_template_of_the_version_it_is_compared_with(bench: Bench) -> None:
    template = "{{ messages[0].content }}{{ eos_token }}"
    base = bench.registry.models.parent / "untemplated"
    shutil.copytree(bench.registry.artifact(VersionId(NAME, 1), Format.MERGED), base)
    (base / "config.json").write_text('{"model_type": "llama"}', "utf-8")
    revision = revision_with_template(hash_files(model_files(base)), template)
    (bench.registry.artifact(VersionId(NAME, 2), Format.MERGED) / "chat_template.jinja").write_text(template, "utf-8")
    trained = bench.registry.manifest(VersionId(NAME, 2)).base.model_copy(update={"revision": revision})
    bench.change(2, base=trained, recipe={"chat_template": "own.jinja"})
    settings = bench.settings
    found = [
        find_model(name, bench.registry, settings, format=None, key=None)
        for name in (str(base), f"{NAME}@2", f"{NAME}@1")
    ]
    asked = asked_alike(found[0], found[1], settings.base_cache)
    assert isinstance(asked, LocalModel)
    assert (read_chat_template(asked.folder), asked.revision) == (template, revision)
    with pytest.raises(BaseModelError, match="untemplated has no chat template"):
        asked_alike(found[0], found[2], settings.base_cache)
