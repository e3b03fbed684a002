"""Tests that an engine inherits the environment variables its libraries read, but no secrets."""

import os

import pytest

from svc.engine.vllm.environment import inherited_environment


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)


def test_engine_inherits_environment_variables_used_by_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NCCL_DEBUG", "OMP_NUM_THREADS", "ATEN_CPU_CAPABILITY", "HF_HOME"),
        *("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CPU_OMP_THREADS_BIND"),
        *("VLLM_LOGGING_LEVEL", "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME"),
    ]
    for name in names:
        monkeypatch.setenv(name, "x")
    assert inherited_environment() == dict.fromkeys(names, "x")


def test_engine_inherits_neither_secrets_nor_unrelated_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN", "HF_TOKEN_PATH"),
        *("VLLM_API_KEY", "OPENAI_API_KEY", "MLFLOW_TRACKING_PASSWORD", "SVC_HOME", "DATABASE_URL", "PATHOLOGY"),
    ):
        monkeypatch.setenv(name, "x")
    assert inherited_environment() == {}


def test_engine_inherits_environment_variables_named_in_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PLUGIN_KEY", "x")
    assert inherited_environment(["MY_PLUGIN_KEY"]) == {"MY_PLUGIN_KEY": "x"}
