"""Tests `svc compare` on the command line: where keys come from, and the exit code."""

import json
from pathlib import Path

import pytest

from svc.evaluation.comparison import compare
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.metrics.text import ExactMatch
from tests.command_line import Svc
from tests.svc.evaluation.answered import answered
from trainer.evaluation.comparison.job import Answers, Compared, ComparisonJob, Questions, Wanted
from trainer.evaluation.comparison.model import LocalModel


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Wanted]:
    """Return the recorded requests. A model whose name ends in "bad" gives wrong answers."""
    requests: list[Wanted] = []

    def run(job: ComparisonJob) -> Compared:
        wanted = job.wanted
        requests.append(wanted)
        names = [wanted.first, wanted.second]
        evaluated = [answered([("no" if name.endswith("bad") else "yes", "yes")] * 10) for name in names]
        models = [LocalModel(name, Path(name), "sha256:0", {}) for name in names]
        answers = [Answers(tuple(evaluation.results), kept=False) for evaluation in evaluated]
        questions = Questions(evaluated[0].examples, "FILE", 8, [ExactMatch()])
        comparison = compare(evaluated[0].examples, evaluated[0].results, evaluated[1].results, [ExactMatch()])
        return Compared(models, questions, answers, comparison)

    monkeypatch.setattr(ComparisonJob, "run", run)
    return requests


@pytest.mark.parametrize(
    ("models", "options", "code"),
    [
        (("good", "bad"), (), 0),
        (("good", "bad"), ("--fail-if-worse",), 1),
        (("bad", "good"), ("--fail-if-worse",), 0),
        (("good", "good"), ("--fail-if-worse",), 0),
    ],
)
@pytest.mark.usefixtures("asked")
def test_fail_if_worse_option_exits_with_1_when_the_second_model_is_worse(
    svc: Svc, models: tuple[str, str], options: tuple[str, ...], code: int
) -> None:
    assert svc("compare", *models, *options).code == code


@pytest.mark.usefixtures("asked")
def test_json_output_contains_metrics_and_answers(svc: Svc) -> None:
    content = json.loads(svc("compare", "good", "bad", "--json").out)
    assert content["direction"] == "worse"
    assert content["tally"] == {"metric": "exact_match", "wins": 0, "losses": 10, "ties": 0, "p_value": 0.001953125}
    assert len(content["answers"]) == 10
    assert content["answers"][0]["b"]["answer"] == "no"


def test_api_key_is_read_from_a_private_file_or_an_environment_variable(
    svc: Svc, asked: list[Wanted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("sk-file\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setenv("ELSEWHERE_KEY", "sk-variable")
    svc("compare", "a", "b", "--endpoint-key-file", tmp_path / "key")
    svc("compare", "a", "b", "--endpoint-key-variable", "ELSEWHERE_KEY")
    svc("compare", "a", "b")
    assert [wanted.key for wanted in asked] == ["sk-file", "sk-variable", None]
    assert "sk-" not in repr(asked)


def test_error_for_an_unset_endpoint_key_names_the_environment_variable(svc: Svc, asked: list[Wanted]) -> None:
    ended = svc("compare", "a", "b", "--endpoint-key-variable", "NO_SUCH_KEY")
    assert ended.code == 2
    assert "NO_SUCH_KEY is not set" in ended.err
    assert asked == []


def test_judge_requires_both_a_url_and_a_model(svc: Svc, asked: list[Wanted]) -> None:
    svc("compare", "a", "b", "--judge-url", "https://judge.example/v1", "--judge-model", "m")
    assert asked[0].judge == Endpoint("https://judge.example/v1", "m")
    ended = svc("compare", "a", "b", "--judge-url", "https://judge.example/v1")
    assert ended.code == 2
    assert "--judge-url and --judge-model must be given together" in ended.err


def test_no_judge_is_used_unless_configured(svc: Svc, asked: list[Wanted]) -> None:
    svc("compare", "a", "b")
    assert asked[0].judge is None
