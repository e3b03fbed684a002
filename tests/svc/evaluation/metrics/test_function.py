"""Tests that a user's function scores answers in its own process, and that its failures name the function."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from svc.errors import RecipeError
from svc.evaluation.metrics.function import FunctionMetric, FunctionSpec
from svc.evaluation.metrics.metric import Answered
from tests.svc.evaluation.answered import answered

GIVEN = answered([("a", "a"), ("b", "c")])
Write = Callable[..., FunctionMetric]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(body: str, seconds: float = 30.0, signature: str = "answers, references") -> FunctionMetric:
        path = tmp_path / "my_metric.py"
        indented = body.replace("\n", "\n    ")
        path.write_text(f"def score({signature}):\n    {indented}\n", "utf-8")
        return FunctionMetric(FunctionSpec(path, "score"), seconds)

    return write


def test_metric_function_returns_one_score_per_answer(write: Write) -> None:
    assert write("return [len(a) + (a == r) for a, r in zip(answers, references)]").score(GIVEN) == [2.0, 1.0]


def test_metric_function_can_read_the_prompts(write: Write) -> None:
    metric = write(
        "return [p[-1]['content'] == f'q {i}' for i, p in enumerate(prompts)]", signature="answers, _, prompts"
    )
    assert metric.score(GIVEN) == [1.0, 1.0]


def test_printed_output_of_a_metric_function_is_not_read_as_scores(
    write: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    assert write("print('{\"scores\": [9]}')\nreturn [0.5, 1]").score(GIVEN) == [0.5, 1.0]
    assert "scores" in capfd.readouterr().err


@pytest.mark.slow
def test_metric_function_may_return_an_array(write: Write) -> None:
    assert write("import numpy\nreturn numpy.array([0.25, 1])").score(GIVEN) == [0.25, 1.0]


def test_metric_function_cannot_read_the_store_url_from_its_environment(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVC_STORE__URL", "postgresql://svc:s3cret@db/store")
    assert write("import os\nreturn ['SVC_STORE__URL' in os.environ] * 2").score(GIVEN) == [0.0, 0.0]


def test_metric_function_can_import_modules_from_its_own_folder(write: Write, tmp_path: Path) -> None:
    (tmp_path / "length.py").write_text("two = 2", "utf-8")
    assert write("import length\nreturn [length.two] * 2").score(GIVEN) == [2.0, 2.0]


def test_metric_function_receives_non_ascii_text_unchanged(write: Write) -> None:
    metric = write("return [ord(a) for a in answers]")
    assert metric.score(answered([("日", "x")])) == [float(ord("日"))]


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("raise ValueError('no such word')", "ValueError: no such word"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("return [1.0]", "returned invalid scores: 1 scores for 2 answers"),
        ("return 0.5", "'float' object is not iterable"),
        ("return '10'", "score must return a list of numbers, got '10'"),
        ("return {0: 1.5, 1: 0.5}", "score must return a list of numbers, got {0: 1.5, 1: 0.5}"),
        ("return None", "score must return a list of numbers, got None: 'NoneType' object is not iterable"),
        ("return [1.0, float('nan')]", "the score of answer 2 is nan"),
        ("return [1.0, float('inf')]", "the score of answer 2 is inf"),
        (
            "return [1.0, 'good']",
            "score must return a list of numbers, got [1.0, 'good']: could not convert string to float: 'good'",
        ),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os\nos._exit(3)", "with code 3"),
        ("import os\nos.kill(os.getpid(), 9)", "with code -9"),
    ],
)
def test_metric_function_error_names_the_file_and_function(write: Write, body: str, wrong: str) -> None:
    with pytest.raises(RecipeError) as caught:
        write(body).checked_score(GIVEN)
    assert wrong in caught.value.wrong
    assert "my_metric" in caught.value.wrong
    assert caught.value.todo or caught.value.expected


def test_metric_function_traceback_contains_only_lines_of_user_code(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        write("value = {}\nreturn value['score']").score(GIVEN)
    assert "return value['score']" in caught.value.wrong
    assert "function_worker" not in caught.value.wrong


@pytest.mark.slow
@pytest.mark.parametrize("body", ["while True: pass", "import subprocess\nsubprocess.run(['sleep', '60'])"])
def test_metric_function_is_stopped_after_its_timeout(write: Write, body: str) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"did not finish within 1 s"):
        write(body, seconds=1.0).score(GIVEN)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", ["missing.py:score", "my_metric.py:other"])
def test_missing_metric_function_is_named_in_the_error(write: Write, tmp_path: Path, name: str) -> None:
    write("return []")
    spec = FunctionSpec.parse(str(tmp_path / name))
    assert spec is not None
    with pytest.raises(RecipeError, match=name.rpartition(":")[0 if "missing" in name else 2]):
        FunctionMetric(spec, 30.0).score(GIVEN)


@pytest.mark.parametrize(
    ("text", "name"),
    [("./my_metric.py:score", "my_metric_score"), ("/a/Score.py:score", "score"), ("b-c.py:f", "b_c_f")],
)
def test_metric_name_combines_file_and_function_names(text: str, name: str) -> None:
    spec = FunctionSpec.parse(text)
    assert spec is not None and spec.name == name


@pytest.mark.parametrize("text", ["rouge", "my_metric:score", "x.py", "x.py:"])
def test_text_that_does_not_name_a_python_file_and_function_is_not_a_function_spec(text: str) -> None:
    assert FunctionSpec.parse(text) is None


def test_metric_function_may_return_an_empty_list_when_there_are_no_answers(write: Write) -> None:
    assert write("return []").score(Answered([], [])) == []
