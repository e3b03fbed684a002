"""Tests showing a version on one screen, with the primary metric at the top."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from svc.evaluation.evaluator import EvaluationReport, score_answers
from svc.evaluation.forgetting import measure_forgetting
from svc.evaluation.general.general_set import GeneralSet
from svc.evaluation.preference import PairScores, PreferenceReport
from svc.registry.files import record_files
from svc.registry.manifest import FormatRecord, Manifest, SelectedBy
from svc.registry.render import evaluation_table, print_version
from svc.version import Format, VersionId
from tests.command_line import Svc
from tests.svc.chats import chat
from tests.svc.evaluation.answered import answered
from tests.svc.registry.conftest import Register
from tests.svc.registry.manifests import gate_report, make_manifest


def text_report(answer: str) -> EvaluationReport:
    given = answered([(f"{answer} {place}", f"a line of text, number {place}") for place in range(6)])
    return score_answers(given.examples, given.results, 1.0).report


def shown(table: Table) -> list[list[str]]:
    """Return the cell texts of each row."""
    out = StringIO()
    Console(file=out, width=120).print(table)
    return [[cell for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    (tmp_path / "merged").mkdir()
    (tmp_path / "heldout.jsonl").touch()
    (tmp_path / "reference").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    files = record_files(tmp_path, tmp_path / "merged")
    formats = {Format.MERGED: FormatRecord(files=files, evaluation=text_report("a line of text, number"))}
    return make_manifest(VersionId("tiny", 1), tmp_path, base_evaluation=text_report("what"), formats=formats)


def test_version_page_lists_the_primary_metric_first_and_shows_confidence_intervals(manifest: Manifest) -> None:
    heads, first, *others = shown(evaluation_table(manifest))
    assert [head.strip() for head in heads] == ["base", "merged"]
    assert first[0].strip() == "ROUGE-L"
    assert first[2].strip().startswith("1.000 [")
    titles = [row[0].strip() for row in others]
    assert titles == [
        *("ROUGE-1", "ROUGE-2", "chrF", "exact match", "perplexity", "length"),
        *("cut off at the limit", "NLL / token", "size", "load", "tokens/s"),
    ]


@pytest.mark.parametrize(
    ("selected_by", "shown"),
    [
        (SelectedBy.NONE, "examples; primary metric: ROUGE-L\n"),
        (SelectedBy.HELDOUT, "ROUGE-L; these examples selected the version, so its results are slightly too good"),
        (SelectedBy.VALIDATION, "ROUGE-L; the version was selected on 7 other examples (data.validation)"),
    ],
)
def test_version_page_states_which_examples_were_used_to_select_the_version(
    manifest: Manifest, capsys: pytest.CaptureFixture[str], selected_by: SelectedBy, shown: str
) -> None:
    data = manifest.data.model_copy(update={"selected_by": selected_by, "validation_examples": 7})
    print_version(manifest.model_copy(update={"data": data}), Path("/v"))
    assert shown in capsys.readouterr().out


def test_forgetting_is_shown_if_it_was_measured(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (answered([(text, "right")] * 10).results for text in ("so: right", "wrong"))
    questions = GeneralSet("own.jsonl", (chat("q", "right"),) * 10, (("right",),) * 10)
    found = {
        Format.MERGED: measure_forgetting(questions, before, before),
        Format.GPTQ: measure_forgetting(questions, before, after),
    }
    print_version(manifest.model_copy(update={"forgetting": found}), Path())
    with_it = " ".join(capsys.readouterr().out.split())
    known = "1.000 [0.722, 1.000]"
    assert f"10 general questions base merged gptq right answers {known} {known} 0.000 [0.000, 0.278]" in with_it
    assert "lost, gained 0, 0 10, 0" in with_it
    print_version(manifest, Path())
    assert "general questions" not in capsys.readouterr().out


def test_preference_metrics_are_shown_if_they_were_measured(
    manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    base = PairScores(chosen=(-4.0,) * 10, rejected=(-3.0,) * 10)
    trained = PairScores(chosen=(-4.0,) * 10, rejected=(-6.0,) * 10)
    record = manifest.formats[Format.MERGED].model_copy(update={"preference": PreferenceReport.of(trained, base)})
    changes = {"formats": {Format.MERGED: record}, "base_preference": PreferenceReport.of(base)}
    print_version(manifest.model_copy(update=changes), Path())
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "10 held-out pairs base merged chosen answer is more likely 0.000 [0.000, 0.278] 1.000 [0.722, 1.000]" in output
    )
    assert "chosen answer gained more 1.000 [0.722, 1.000] by, in nats 3.000 [3.000, 3.000]" in output
    print_version(manifest, Path())
    assert "pairs" not in capsys.readouterr().out


def test_version_page_shows_each_gate_verdict_once(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    gates = (gate_report(0.04), gate_report(0.09))
    print_version(manifest.model_copy(update={"gates": gates}), Path())
    told = " ".join(capsys.readouterr().out.split())
    assert "at most 0.050 (evaluate.max_gptq_loss): passed: a larger loss is excluded with 60 examples" in told
    assert "undecided: a loss of up to 0.090 cannot be excluded with 60 examples; about 500 would decide" in told
    failed = {"gates": gates, "failed": (str(gates[1]),)}
    print_version(manifest.model_copy(update=failed), Path())
    assert " ".join(capsys.readouterr().out.split()).count("undecided:") == 1


def test_exact_match_is_shown_when_it_is_the_primary_metric(svc: Svc, register: Register) -> None:
    made = register(None)
    assert "primary metric: exact match" in svc("show", str(made.id)).out
    assert "exact match 0.500" in " ".join(svc("models").out.split())


def test_chat_template_is_shown_when_chosen_by_the_recipe(
    manifest: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_version(manifest, tmp_path)
    assert "chat template" not in capsys.readouterr().out
    print_version(manifest.model_copy(update={"recipe": {"chat_template": "alpaca"}}), tmp_path)
    assert "chat template: alpaca (chat_template in the recipe)" in capsys.readouterr().out
