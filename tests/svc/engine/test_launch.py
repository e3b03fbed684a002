"""How the engine is started: what it may load, where it listens, and what it is told about the machine."""

import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from svc.engine import launch
from svc.engine.launch import EngineSpec, command, device_of, environment, installed_vllm, is_eager, launch_digest
from svc.errors import EngineError
from svc.settings import Device, EngineSettings


def spec(folder: Path, **settings: Any) -> EngineSpec:
    return EngineSpec(
        model=folder / "model",
        served_name="tuned",
        runtime=folder / "run",
        state=folder / "state",
        log=folder / "engine.log",
        cache=folder / "cache",
        settings=EngineSettings(**{"device": Device.CPU, **settings}),
    )


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def write_config(folder: Path, content: str) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(content)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The installed distributions with their versions; the test fills it."""
    distributions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in distributions:
            raise PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(launch, "version", version)
    installed_vllm.cache_clear()
    yield distributions
    installed_vllm.cache_clear()


def test_it_listens_on_the_private_socket_alone(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--uds") == str(tmp_path / "run" / "engine.sock")
    assert "--host" not in arguments
    assert "--port" not in arguments


def test_it_loads_safetensors_and_no_code_of_a_model(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--load-format") == "safetensors"
    assert "--trust-remote-code" not in arguments


def test_it_answers_to_one_name(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--served-model-name") == "tuned"
    assert option(arguments, "--model") == str(tmp_path / "model")


@pytest.mark.parametrize(("own", "used"), [(512, "512"), (100_000, "2048")])
def test_the_context_is_never_longer_than_the_models(tmp_path: Path, own: int, used: str) -> None:
    write_config(tmp_path, json.dumps({"max_position_embeddings": own}))
    assert option(command(spec(tmp_path)), "--max-model-len") == used


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"max_position_embeddings": null}'])
def test_a_model_that_does_not_say_gets_the_setting(tmp_path: Path, content: str) -> None:
    write_config(tmp_path, content)
    assert option(command(spec(tmp_path, max_model_len=99)), "--max-model-len") == "99"


def test_further_arguments_come_last_so_that_they_win(tmp_path: Path) -> None:
    assert command(spec(tmp_path, args=("--seed", "1")))[-2:] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("device", "eager", "expected"),
    [
        (Device.CPU, None, True),
        (Device.CUDA, None, False),
        (Device.CPU, False, False),
        (Device.CUDA, True, True),
    ],
)
def test_compilation_is_skipped_on_the_cpu_unless_said_otherwise(
    tmp_path: Path, device: Device, eager: bool | None, expected: bool
) -> None:
    made = spec(tmp_path, device=device, eager=eager)
    assert is_eager(made.settings) is expected
    assert ("--enforce-eager" in command(made)) is expected
    assert ("TORCHDYNAMO_DISABLE" in environment(made)) is expected


def test_the_environment_opens_the_reload_and_closes_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", "kept")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    variables = environment(spec(tmp_path))
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert variables["MINE"] == "kept"


def test_the_engine_may_use_the_cores_that_this_process_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert environment(spec(tmp_path))["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"


def test_the_size_of_the_cache_is_not_overruled_by_an_inherited_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    made = spec(tmp_path, kv_cache_gib=3)
    assert option(command(made), "--kv-cache-memory-bytes") == str(3 * 2**30)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(made)


def test_one_engine_has_one_plan_whatever_the_machine_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    before = made.plan
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    assert made.plan is before
    assert environment(made)["VLLM_CPU_OMP_THREADS_BIND"] == "1"


def test_a_load_format_in_the_arguments_is_not_passed_twice(tmp_path: Path) -> None:
    assert command(spec(tmp_path, args=("--load_format=dummy",))).count("--load-format") == 0


@pytest.mark.parametrize(("argument", "eager"), [("--enforce-eager", True), ("--no-enforce-eager", False)])
def test_arguments_decide_on_compilation_before_the_setting(tmp_path: Path, argument: str, eager: bool) -> None:
    made = spec(tmp_path, args=(argument,), eager=not eager)
    assert is_eager(made.settings) is eager
    assert ("TORCHDYNAMO_DISABLE" in environment(made)) is eager


@pytest.mark.parametrize(("distribution", "device"), [("vllm", Device.CUDA), ("vllm-cpu", Device.CPU)])
def test_auto_is_the_device_of_the_installed_vllm(installed: dict[str, str], distribution: str, device: Device) -> None:
    installed[distribution] = "0.32.0"
    assert installed_vllm() == (device, "0.32.0")
    assert device_of(EngineSettings()) is device


def test_no_vllm_says_what_to_install(installed: dict[str, str]) -> None:
    with pytest.raises(EngineError, match="not installed") as caught:
        device_of(EngineSettings())
    assert "tuneserve[serve-cpu]" in caught.value.todo


def test_engines_that_share_a_gpu_by_number_are_started_otherwise_with_another_number(tmp_path: Path) -> None:
    def differs(**settings: Any) -> bool:
        one, two = (launch_digest(spec(tmp_path, replicas=number, **settings)) for number in (1, 2))
        return one != two

    assert differs(device=Device.CUDA)
    assert not differs(device=Device.CUDA, gpu_memory_share=0.4)
    assert not differs(device=Device.CPU)
