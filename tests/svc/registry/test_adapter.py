"""Tests adapters that vLLM can apply to their base, and the errors for those it cannot."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from svc.errors import IntegrityError, NotFoundError, RefusedError
from svc.model_folder.chat_template import TEMPLATE_KWARGS_FILE
from svc.registry.adapter import CONFIG_FILE, adapter_refusal, read_adapter
from svc.registry.registry import Registry
from svc.version import Format, VersionId
from tests.serving.versions import AliasBook, base_folder, make_version

LORA = {"peft_type": "LORA", "r": 16, "target_modules": ["q_proj"], "init_lora_weights": True, "bias": "none"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models", AliasBook())


def made(registry: Registry, **adapter: Any) -> VersionId:
    return make_version(registry, 1, formats=(Format.ADAPTER,), adapter=adapter)


@pytest.mark.parametrize("said", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"use_dora": False}])
def test_lora_and_rslora_adapters_are_accepted(said: dict[str, Any]) -> None:
    assert adapter_refusal(LORA | said) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "ADALORA"}, "AdaLoRA"),
        ({"peft_type": "VERA"}, "VeRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "bias"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "fully trained"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_modules": "all-linear"}, "lacks the names of the adapted layers"),
        ({"r": None}, "lacks the names of the adapted layers"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "experts"),
    ],
)
def test_reason_for_rejecting_an_adapter_names_the_unsupported_feature(said: dict[str, Any], told: str) -> None:
    assert told in (adapter_refusal(LORA | said) or "")


def test_unservable_adapter_error_suggests_the_merged_format(registry: Registry) -> None:
    version = made(registry, use_dora=True)
    with pytest.raises(RefusedError, match="cannot be served as an adapter: it is DoRA") as caught:
        read_adapter(registry, version)
    assert "--format merged" in caught.value.todo


def test_adapter_info_includes_base_model_and_rank_and_target_layers(registry: Registry) -> None:
    version = made(registry, target_modules=["model.layers.0.q_proj", "v_proj"], rank_pattern={"v_proj": 48})
    found = read_adapter(registry, version)
    assert (found.base.folder, found.base.revision) == (base_folder(registry), "1")
    assert (found.rank, found.targets) == (48, frozenset({"q_proj", "v_proj"}))
    assert found.bytes == sum(file.stat().st_size for file in found.folder.iterdir())


def test_chat_template_of_the_base_model_receives_the_arguments_used_in_training(registry: Registry) -> None:
    version, base = made(registry), base_folder(registry)
    (base / TEMPLATE_KWARGS_FILE).write_text(json.dumps({"enable_thinking": True}))
    assert read_adapter(registry, version).base.template_kwargs == (("enable_thinking", True),)


def test_chat_template_with_the_current_date_is_rejected(registry: Registry) -> None:
    version = made(registry)
    (base_folder(registry) / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    with pytest.raises(RefusedError, match="today's date"):
        read_adapter(registry, version)


def test_missing_base_model_of_an_adapter_raises_an_error_with_advice(registry: Registry) -> None:
    version = made(registry)
    shutil.rmtree(base_folder(registry))
    with pytest.raises(NotFoundError, match=r"the base model of tuned@1 is no longer in .*base") as caught:
        read_adapter(registry, version)
    assert "--format merged" in caught.value.todo


def test_version_without_an_adapter_raises_not_found(registry: Registry) -> None:
    with pytest.raises(NotFoundError, match="has no format adapter"):
        read_adapter(registry, make_version(registry, 1))


def test_corrupt_adapter_config_is_rejected(registry: Registry) -> None:
    version = made(registry)
    (registry.folder(version) / "adapter" / CONFIG_FILE).write_text("[")
    with pytest.raises(IntegrityError):
        read_adapter(registry, version)
