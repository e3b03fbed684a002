"""Tests the check of a training with the real `svc estimate`."""

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.files.content_check import check_content
from serving.files.rows import Purpose
from serving.fine_tuning.recipe import Sources, make_recipe, recipe_text
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.training_check import CheckTimeoutError, check_training, command_environment
from svc.errors import BaseModelError, DataError, RecipeError, SvcError
from svc.settings.load import load_settings
from svc.settings.settings import Settings
from tests.published_examples import published
from tests.trainer.estimate.configs import FOLDER


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return the settings of one home for all checks, because the first one measures the machine's speed."""
    return Settings(home=tmp_path_factory.mktemp("check") / "home")


def examples(folder: Path, *, bad: bool = False) -> Path:
    path = folder / "file-1"
    turns = [{"role": "user", "content": "question {}"}, {"role": "assistant", "content": "answer"}]
    lines = [json.dumps({"messages": turns}).replace("{}", str(number)) for number in range(40)]
    path.write_text("\n".join([*lines, "no JSON"] if bad else lines), "utf-8")
    return path


def recipe(folder: Path, config: str = "llama-3.2-1b", *, bad: bool = False, **fields: Any) -> str:
    request = JobRequest.model_validate_json(json.dumps({"model": "small", "training_file": "file-1", **fields}))
    made = make_recipe(request, "tuned", Sources(str(FOLDER / config), examples(folder, bad=bad), None))
    return recipe_text(made)


@pytest.mark.slow
async def test_training_check_of_examples_published_by_openai_reports_their_number_and_the_duration(
    tmp_path: Path, settings: Settings
) -> None:
    (tmp_path / "file-1").write_text(published(toy=4, drone=3), "utf-8")
    assert check_content(tmp_path / "file-1", Purpose.FINE_TUNE).usable
    request = JobRequest.model_validate_json('{"model": "small", "training_file": "file-1"}')
    made = make_recipe(request, "tuned", Sources(str(FOLDER / "llama-3.2-1b"), tmp_path / "file-1", None))
    check = await check_training(recipe_text(made), settings, timeout_s=300)
    assert (check.refused, check.examples) == (None, 5)  # one is held out, and one has no user turn
    assert 0 < check.learning_rate < 5e-4
    assert check.seconds > 0


@pytest.mark.slow
async def test_training_check_refuses_a_model_that_does_not_fit_in_memory(tmp_path: Path, settings: Settings) -> None:
    full = recipe(tmp_path, "llama-2-70b", recipe={"method": "full"})
    check = await check_training(full, settings, timeout_s=300)
    assert check.refused is not None
    assert "short" in check.refused


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"bad": True}, DataError, "file-1:41"),
        ({"recipe": {"adapter": {"rank": 5000}}}, RecipeError, "^'adapter.rank' is 5000"),
        ({"recipe": {"chat_template": "other"}}, RecipeError, "chat_template"),
        ({"method": {"type": "dpo"}}, DataError, "file-1"),
        ({"config": "none"}, BaseModelError, "has no config.json"),
    ],
    ids=str,
)
async def test_training_check_raises_the_error_that_training_would_raise(
    tmp_path: Path, settings: Settings, fields: dict[str, Any], kind: type[SvcError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        await check_training(recipe(tmp_path, **fields), settings, timeout_s=300)
    assert "do:" not in str(caught.value.expected)


def _is_estimate(process: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has exited
        return "estimate" in process.cmdline()
    return False


@pytest.mark.slow
async def test_timed_out_training_check_leaves_no_process_behind(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(CheckTimeoutError):
        await check_training(recipe(tmp_path), settings, timeout_s=0.3)
    assert not any(map(_is_estimate, psutil.Process().children()))


@pytest.mark.slow
async def test_cancelled_training_check_leaves_no_process_behind(tmp_path: Path, settings: Settings) -> None:
    task = asyncio.create_task(check_training(recipe(tmp_path), settings, timeout_s=60))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(map(_is_estimate, psutil.Process().children()))


def test_training_check_command_gets_the_server_settings_except_the_store_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVC_ENGINE__MAX_MODEL_LEN", "512")
    monkeypatch.setenv("SVC_STORE__URL", "postgresql://user:password@host/database")
    given = load_settings(home=tmp_path / "home", engine={"max_model_len": 1024})
    environment = command_environment(given)
    assert "password" not in json.dumps(environment)
    for name in [name for name in os.environ if name.startswith("SVC_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    loaded = load_settings()
    assert (loaded.home, loaded.engine.max_model_len, loaded.store.url) == (tmp_path / "home", 1024, None)
