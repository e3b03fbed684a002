"""Runs models with their publishers' metadata files from training to the merged model, without an engine.

HUB_CONFIGS names a folder of such files, ORG__MODEL/config.json and others. See
tests.hub_models.published.
"""

import os
import time
from pathlib import Path

import pytest

from svc.errors import BaseModelError
from svc.settings.settings import Settings
from tests.e2e.conftest import Report
from tests.hub_models.published import NO_TEMPLATE, build_published, refusal
from tests.hub_models.training import check_merged, train_and_merge
from trainer.base_model.find_base import find_base
from trainer.base_model.resolve import resolve_base
from trainer.recipe.named_template import NamedTemplate

pytestmark = [pytest.mark.matrix]

HUB_CONFIGS = os.environ.get("HUB_CONFIGS")
MODELS = sorted(path.name for path in Path(HUB_CONFIGS).iterdir() if path.is_dir()) if HUB_CONFIGS else ["all"]


@pytest.mark.parametrize("model", MODELS)
def test_model_with_a_published_config_is_either_trained_and_merged_or_refused_with_a_reason(
    tmp_path: Path, report: Report, model: str
) -> None:
    published = Path(HUB_CONFIGS or "") / model
    started = time.monotonic()
    if not HUB_CONFIGS or not (published / "config.json").is_file():
        pytest.skip(f"{model} has no config.json" if HUB_CONFIGS else "HUB_CONFIGS is not set")
    base = build_published(published, tmp_path / "base")
    reason = refusal(published)
    if reason is not None:
        with pytest.raises(BaseModelError, match=reason) as raised:
            train_and_merge(base, tmp_path)
        assert raised.value.expected
        assert raised.value.todo
        if reason == NO_TEMPLATE:
            settings = Settings(base_cache=tmp_path / "cache")
            templated = find_base(str(base), settings, NamedTemplate.CHATML).folder
            check_merged(templated, train_and_merge(templated, tmp_path))
            reason += "; run with chat_template: chatml"
    else:
        base = resolve_base(str(base), tmp_path / "cache").folder
        check_merged(base, train_and_merge(base, tmp_path))
    outcome = "refused" if reason else "run"
    report(f"{model}: {outcome} in {time.monotonic() - started:.1f} s{f': {reason}' if reason else ''}")
