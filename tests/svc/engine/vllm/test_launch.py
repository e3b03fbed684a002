"""Tests how the engine is started: what it may load, where it listens, and its arguments for the machine."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from svc.engine.vllm.choice import Origin
from svc.engine.vllm.launch import EngineSpec, command, environment, launch_digest
from svc.engine.vllm.lora import LoraSlots
from svc.engine.vllm.plugin import INT4_LINEAR_VARIABLE, QUIET_VARIABLE
from svc.model_folder.chat_template import write_template_kwargs
from svc.settings.engine import Device, GptqKernel
from tests.builders.engine_specs import option, spec
from tests.svc.engine.devices import AVX2

SLOTS = LoraSlots(max_loaded=3, max_batched=2, max_rank=16, targets=("q_proj",))


def write_config(folder: Path, content: str) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(content)


def test_engine_listens_only_on_a_private_socket(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--uds") == str(tmp_path / "run" / "engine.sock")
    assert "--host" not in arguments
    assert "--port" not in arguments


def test_engine_loads_only_safetensors_and_does_not_trust_remote_code(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--load-format") == "safetensors"
    assert "--trust-remote-code" not in arguments


def test_engine_is_started_with_the_hugging_face_config_and_tokenizer_formats(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert (option(arguments, "--config-format"), option(arguments, "--tokenizer-mode")) == ("hf", "hf")


@pytest.mark.parametrize(
    ("config", "device", "able"),
    [("{}", Device.CPU, True), ('{"num_experts": 4}', Device.CPU, False), ('{"num_experts": 4}', Device.CUDA, True)],
)
def test_in_place_reload_is_disabled_for_mixture_of_experts_models_on_a_cpu(
    tmp_path: Path, config: str, device: Device, able: bool
) -> None:
    write_config(tmp_path, config)
    assert spec(tmp_path, device=device).engine_capabilities.reloads is able


@pytest.mark.parametrize(
    ("device", "arguments", "probed"),
    [
        (Device.CPU, (), True),
        (Device.CPU, ("--seed", "1"), True),
        (Device.CPU, ("--seed", "1", "--enable-lora"), False),
        (Device.CPU, ("--enable_lora",), False),
        (Device.CPU, ("--enable-lora=true",), False),
        (Device.CPU, ("--enable-lora", "--lora-target-modules", "q_proj", "v_proj"), True),
        (Device.CPU, ("--enable-lora", "--lora-target-modules", "q_proj", "lm_head"), False),
        (Device.CUDA, ("--enable-lora",), True),
    ],
)
def test_engine_is_not_probed_if_a_probe_would_crash_it(
    tmp_path: Path, device: Device, arguments: tuple[str, ...], probed: bool
) -> None:
    able = spec(tmp_path, device=device, args=arguments).engine_capabilities
    assert (able.unprobed is None) is probed


@pytest.mark.parametrize(
    ("arguments", "probed"),
    [((), True), (("--enable-lora",), True), (("--lora-target-modules", "q_proj", "lm_head"), False)],
)
def test_engine_with_adapter_slots_is_probed_unless_lora_targets_include_the_output_layer(
    tmp_path: Path, arguments: tuple[str, ...], probed: bool
) -> None:
    able = replace(spec(tmp_path, args=arguments), lora=SLOTS).engine_capabilities
    assert (able.adapters, able.unprobed is None) == (SLOTS.max_loaded, probed)


def test_engine_without_adapter_slots_accepts_no_adapters(tmp_path: Path) -> None:
    assert spec(tmp_path).engine_capabilities.adapters == 0


def idle(folder: Path, **settings: Any) -> EngineSpec:
    """Return the engine specification for a model with an idle time."""
    return replace(spec(folder, **settings), idles=True)


@pytest.mark.parametrize(
    ("device", "idles", "arguments", "sleeps"),
    [
        (Device.CUDA, True, (), True),
        (Device.CUDA, False, (), False),
        (Device.CPU, True, (), False),
        (Device.CUDA, True, ("--enable-sleep-mode",), True),
        (Device.CUDA, True, ("--no-enable-sleep-mode",), False),
        (Device.CUDA, False, ("--enable-sleep-mode",), False),
    ],
)
def test_gpu_engine_enables_sleep_mode_when_the_model_has_an_idle_timeout(
    tmp_path: Path, device: Device, idles: bool, arguments: tuple[str, ...], sleeps: bool
) -> None:
    made = replace(spec(tmp_path, device=device, args=arguments), idles=idles)
    assert made.engine_capabilities.sleeps is sleeps
    assert ("--enable-sleep-mode" in command(made)) is ("--enable-sleep-mode" in arguments or sleeps)


def test_sleep_mode_given_in_arguments_is_not_passed_twice(tmp_path: Path) -> None:
    given = idle(tmp_path, device=Device.CUDA, args=("--enable_sleep_mode",))
    assert "--enable-sleep-mode" not in command(given)
    assert given.plan["enable_sleep_mode"].origin is Origin.ARGS


def test_launch_digest_depends_on_sleep_mode(tmp_path: Path) -> None:
    def differs(device: Device) -> bool:
        return launch_digest(spec(tmp_path, device=device)) != launch_digest(idle(tmp_path, device=device))

    assert differs(Device.CUDA)
    assert not differs(Device.CPU)


def test_engine_serves_the_model_in_its_folder_under_a_single_name(tmp_path: Path) -> None:
    arguments = command(spec(tmp_path))
    assert option(arguments, "--served-model-name") == "tuned"
    assert option(arguments, "--model") == str(tmp_path / "model")


@pytest.mark.parametrize(("own", "used"), [(512, "512"), (100_000, "2048")])
def test_configured_context_length_never_exceeds_the_context_length_of_the_model(
    tmp_path: Path, own: int, used: str
) -> None:
    write_config(tmp_path, json.dumps({"max_position_embeddings": own}))
    assert option(command(spec(tmp_path)), "--max-model-len") == used


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"max_position_embeddings": null}'])
def test_context_length_comes_from_settings_when_the_model_config_has_none(tmp_path: Path, content: str) -> None:
    write_config(tmp_path, content)
    assert option(command(spec(tmp_path, max_model_len=99)), "--max-model-len") == "99"


def test_user_engine_arguments_come_last_and_take_precedence(tmp_path: Path) -> None:
    assert command(spec(tmp_path, args=("--seed", "1")))[-2:] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        (Device.CPU, (), True),
        (Device.CUDA, (), False),
        (Device.CPU, ("--no-enforce-eager",), False),
        (Device.CUDA, ("--enforce-eager",), True),
    ],
)
def test_compilation_is_disabled_on_cpu_by_default(
    tmp_path: Path, device: Device, arguments: tuple[str, ...], expected: bool
) -> None:
    made = spec(tmp_path, device=device, args=arguments)
    assert ("--enforce-eager" in command(made)) is expected
    assert ("TORCHDYNAMO_DISABLE" in environment(made)) is expected


def test_engine_environment_enables_weight_reloads_and_disables_network_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    variables = environment(spec(tmp_path))
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert variables["VLLM_RPC_BASE_PATH"] == str(tmp_path / "run")  # instead of a folder that all users can write
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert "HF_TOKEN" not in variables


def test_engine_uses_the_cpu_affinity_of_the_parent_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert environment(spec(tmp_path))["OMP_NUM_THREADS"] == "2"


def test_inherited_environment_variable_does_not_override_the_configured_cache_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    made = spec(tmp_path, kv_cache_gib=3)
    assert option(command(made), "--kv-cache-memory-bytes") == str(3 * 2**30)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(made)


def test_engine_plan_is_computed_once_and_ignores_later_machine_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = spec(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    before = made.plan
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    assert made.plan is before
    assert environment(made)["OMP_NUM_THREADS"] == "1"


def test_load_format_given_in_arguments_is_not_passed_twice(tmp_path: Path) -> None:
    assert command(spec(tmp_path, args=("--load_format=dummy",))).count("--load-format") == 0


def test_launch_digest_depends_on_the_number_of_engines_sharing_a_gpu(tmp_path: Path) -> None:
    def differs(**settings: Any) -> bool:
        one, two = (launch_digest(spec(tmp_path, replicas=number, **settings)) for number in (1, 2))
        return one != two

    assert differs(device=Device.CUDA)
    assert not differs(device=Device.CUDA, gpu_memory_share=0.4)
    assert not differs(device=Device.CPU)


def test_launch_digest_does_not_depend_on_the_replica_removal_delay(tmp_path: Path) -> None:
    one, two = (
        launch_digest(spec(tmp_path, device=Device.CUDA, replicas={"max": 2, "remove_after_s": seconds}))
        for seconds in (300, 900)
    )
    assert one == two


GPTQ = json.dumps({"dtype": "bfloat16", "quantization_config": {"quant_method": "gptq", "bits": 4}})


def test_engine_entry_point_exists_in_installed_vllm(tmp_path: Path) -> None:
    entry = "vllm.entrypoints.launchers.api_server.entry"
    package = find_spec("vllm")
    assert package and package.origin
    assert Path(package.origin).parent.joinpath(*entry.split(".")[1:]).with_suffix(".py").is_file()
    assert command(spec(tmp_path, device=Device.CUDA))[1:3] == ["-m", entry]
    assert command(spec(tmp_path, device=Device.CPU))[1:4] == ["-m", "svc.engine.vllm.start", entry]


def test_vllm_plugins_and_disabled_kernels_set_by_the_user_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, GPTQ)
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "TheirKernel")
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    variables = environment(spec(tmp_path, gptq_kernel=GptqKernel.TORCH))
    assert variables["VLLM_DISABLED_KERNELS"] == "TheirKernel,CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"
    assert variables["VLLM_PLUGINS"] == "theirs,tuneserve"


def test_tuneserve_plugin_is_added_to_the_vllm_plugins_selected_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    assert environment(spec(tmp_path))["VLLM_PLUGINS"] == "theirs,tuneserve"


def test_engine_log_contains_no_request_text(tmp_path: Path) -> None:
    """The development mode alone would log the stacks of rejected requests, which end with the requests' texts."""
    assert "--no-log-error-stack" in command(spec(tmp_path))
    assert not any("log-requests" in argument or "log-outputs" in argument for argument in command(spec(tmp_path)))
    assert environment(spec(tmp_path))[QUIET_VARIABLE] == "1"
    assert "--no-log-error-stack" not in command(spec(tmp_path, args=("--log-error-stack",)))


def test_vllm_plugin_list_stays_unset_if_the_user_selects_no_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, GPTQ)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_PLUGINS" not in environment(spec(tmp_path, gptq_kernel=GptqKernel.TORCH))


def test_launch_digest_depends_on_kernel_and_device_capabilities(tmp_path: Path) -> None:
    write_config(tmp_path, GPTQ)
    gptq, other = (spec(tmp_path, gptq_kernel=kernel) for kernel in (GptqKernel.VLLM, GptqKernel.TORCH))
    assert launch_digest(gptq) != launch_digest(other)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert launch_digest(spec(tmp_path)) == launch_digest(spec(tmp_path, gptq_kernel=GptqKernel.TORCH))
    assert launch_digest(spec(tmp_path)) != launch_digest(replace(spec(tmp_path), capabilities=AVX2))


def test_launch_digest_depends_on_the_instruction_set_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)  # the environment of the tests may set it
    free = launch_digest(spec(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert launch_digest(spec(tmp_path)) != free


@pytest.mark.parametrize(("given", "used"), [(None, "INFO"), ("ERROR", "INFO"), ("DEBUG", "DEBUG")])
def test_vllm_log_level_is_verbose_enough_to_log_startup_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, used: str
) -> None:
    """TRL sets the variable to ERROR in the process that trains and then evaluates."""
    if given is None:
        monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    else:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", given)
    assert environment(spec(tmp_path))["VLLM_LOGGING_LEVEL"] == used


def test_engine_does_not_inherit_the_variable_that_enables_the_int4_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INT4_LINEAR_VARIABLE, "1")
    assert INT4_LINEAR_VARIABLE not in environment(spec(tmp_path))


def test_template_arguments_stored_in_the_model_folder_are_passed_to_the_chat_template(tmp_path: Path) -> None:
    write_config(tmp_path, "{}")
    plain = launch_digest(spec(tmp_path))
    assert "--default-chat-template-kwargs" not in command(spec(tmp_path))
    write_template_kwargs(tmp_path / "model", {"enable_thinking": False})
    assert json.loads(option(command(spec(tmp_path)), "--default-chat-template-kwargs")) == {"enable_thinking": False}
    assert launch_digest(spec(tmp_path)) != plain


def test_engine_template_arguments_override_template_arguments_in_the_model_folder(tmp_path: Path) -> None:
    write_config(tmp_path, "{}")
    write_template_kwargs(tmp_path / "model", {"enable_thinking": False})
    told = replace(spec(tmp_path), template_kwargs={"enable_thinking": True})
    assert json.loads(option(command(told), "--default-chat-template-kwargs")) == {"enable_thinking": True}
    nothing = replace(spec(tmp_path), template_kwargs={})
    assert "--default-chat-template-kwargs" not in command(nothing)


def test_command_line_template_arguments_override_template_arguments_in_the_model_folder(tmp_path: Path) -> None:
    write_config(tmp_path, "{}")
    write_template_kwargs(tmp_path / "model", {"enable_thinking": False})
    given = spec(tmp_path, args=("--default-chat-template-kwargs", "{}"))
    assert command(given).count("--default-chat-template-kwargs") == 1
    assert given.plan["default_chat_template_kwargs"].origin is Origin.ARGS


def test_chat_template_receives_message_content_as_strings_as_in_training(tmp_path: Path) -> None:
    assert option(command(spec(tmp_path)), "--chat-template-content-format") == "string"
    given = command(spec(tmp_path, args=("--chat-template-content-format", "openai")))
    assert option(given, "--chat-template-content-format") == "openai"
