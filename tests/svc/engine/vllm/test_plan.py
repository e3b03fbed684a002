"""Tests engine choices: the user's first, then those for machine and model, within available resources."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine.device import DeviceCapabilities
from svc.engine.machine import Gpu, Machine
from svc.engine.model_facts import ModelFacts
from svc.engine.vllm.choice import Origin
from svc.engine.vllm.number_type import weight_bytes
from svc.engine.vllm.plan import GIB, EnginePlan, EnginePlanner
from svc.engine.vllm.plugin import INT4_LINEAR_VARIABLE
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings
from tests.svc.engine.devices import AMX, AVX2, AVX512, AVX512_ALONE, HOPPER

CACHE = Path("/home/cache")
MODEL = ModelFacts(
    weights=GIB // 4,
    context=8192,
    dtype="bfloat16",
    heads=9,
    kv_heads=3,
    token_bytes=23_040,
    divided_widths=(576, 1536),
)
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB)
HOST = Machine(cores=tuple(range(8)), quota=None, memory=64 * GIB, free=48 * GIB)
CPU, GPU = Device.CPU, Device.CUDA


def plan(
    device: Device = CPU,
    machine: Machine = HOST,
    model: ModelFacts = MODEL,
    args: tuple[str, ...] = (),
    capabilities: DeviceCapabilities | None = None,
    engines: int = 1,
    **settings: Any,
) -> EnginePlan:
    chosen = EngineSettings(args=args, **({"device": device} | settings))
    able = capabilities or (AVX512 if device is CPU else HOPPER)
    return EnginePlanner(chosen, able, machine, model, CACHE, engines).plan()


def origin_and_value(plan: EnginePlan, name: str) -> tuple[Origin, object]:
    return plan[name].origin, plan[name].value


def test_cpu_engine_uses_a_single_process_executor_and_one_thread_per_core() -> None:
    chosen = plan(machine=replace(HOST, cores=(2, 5)))
    assert chosen["distributed_executor_backend"].origin is Origin.MACHINE
    assert chosen.arguments[chosen.arguments.index("--distributed-executor-backend") + 1].endswith(".UniProcExecutor")
    assert origin_and_value(chosen, "threads") == (Origin.MACHINE, 2)
    assert chosen.variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert chosen.variables["OMP_NUM_THREADS"] == "2"


APART = [
    ({"args": ("--distributed-executor-backend", "mp")}, {}, Origin.ARGS),
    ({"args": ("-pp", "2")}, {}, Origin.VLLM),
    ({"args": ("--data-parallel-size=2",)}, {}, Origin.VLLM),
    ({"args": ("--pipeline-parallel-size", "2")}, {}, Origin.VLLM),
    ({}, {"nodes": 2}, Origin.VLLM),
]


@pytest.mark.parametrize(("settings", "machine", "origin"), APART)
def test_model_running_in_a_separate_process_has_its_threads_bound_to_all_cores(
    settings: dict[str, Any], machine: dict[str, Any], origin: Origin
) -> None:
    chosen = plan(machine=replace(HOST, cores=(2, 5), **machine), **settings)
    assert chosen["distributed_executor_backend"].origin is origin
    assert "--distributed-executor-backend" not in chosen.arguments
    assert origin_and_value(chosen, "threads") == (Origin.MACHINE, 2)
    assert chosen.variables["VLLM_CPU_OMP_THREADS_BIND"] == "2,5"
    assert "OMP_NUM_THREADS" not in chosen.variables


def test_gpu_engine_uses_the_default_vllm_executor() -> None:
    assert "--distributed-executor-backend" not in plan(GPU, machine=replace(HOST, gpus=(H100,))).arguments


@pytest.mark.parametrize(("quota", "threads"), [(2.0, "2"), (2.9, "2"), (0.5, "1"), (1.0, "1")])
def test_cpu_quota_limits_the_number_of_threads_and_disables_thread_binding(quota: float, threads: str) -> None:
    chosen = plan(machine=replace(HOST, cores=tuple(range(64)), quota=quota))
    assert chosen.variables["OMP_NUM_THREADS"] == threads
    assert chosen.variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(("engines", "threads"), [(1, "8"), (2, "4"), (3, "2"), (9, "1")])
@pytest.mark.parametrize("nodes", [1, 2])
def test_cores_are_divided_evenly_among_engines(engines: int, threads: str, nodes: int) -> None:
    variables = plan(machine=replace(HOST, nodes=nodes), engines=engines).variables
    bound = variables["VLLM_CPU_OMP_THREADS_BIND"]
    assert variables.get("OMP_NUM_THREADS", str(len(bound.split(",")))) == threads
    # If they were bound to cores by number, all would use the same cores.
    assert engines == 1 or bound == "nobind"


def test_cpu_quota_is_divided_evenly_among_engines() -> None:
    assert plan(machine=replace(HOST, quota=5.0), engines=2).variables["OMP_NUM_THREADS"] == "2"


def test_configured_core_count_overrides_the_share_of_cores_per_engine() -> None:
    chosen = plan(cores=6, engines=2)
    assert origin_and_value(chosen, "threads") == (Origin.SETTING, 6)
    assert chosen.variables["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize(("quota", "most"), [(None, 8), (3.5, 3)])
def test_configured_core_count_above_the_available_cores_is_rejected(quota: float | None, most: int) -> None:
    with pytest.raises(EngineError, match=rf"cores is {most + 1}\n  expected: at most {most}"):
        plan(machine=replace(HOST, quota=quota), cores=most + 1)


def test_cpu_quota_above_the_core_count_has_no_effect() -> None:
    assert plan(machine=replace(HOST, quota=8.0)) == plan()


def test_vllm_thread_binding_variable_set_by_the_user_is_kept() -> None:
    chosen = plan(machine=replace(HOST, threads_bind="0-3"))
    assert origin_and_value(chosen, "threads") == (Origin.ENVIRONMENT, "0-3")
    assert chosen.variables["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


def test_thread_binding_is_left_to_vllm_when_the_engine_uses_several_cpu_ranks() -> None:
    chosen = plan(tensor_parallel=2)
    assert chosen["threads"].origin is Origin.VLLM
    assert "VLLM_CPU_OMP_THREADS_BIND" not in chosen.variables


def test_kv_cache_fits_the_maximum_number_of_concurrent_sequences_of_maximum_length() -> None:
    chosen = plan(max_model_len=2048, max_concurrency=10)
    assert origin_and_value(chosen, "kv_cache_memory_bytes") == (Origin.MODEL, 11 * 2048 * 23_040)
    assert "10 sequences of 2048 tokens" in chosen["kv_cache_memory_bytes"].reason


def test_kv_cache_size_of_each_sequence_is_rounded_up_to_whole_blocks() -> None:
    assert plan(max_model_len=33, max_concurrency=1)["kv_cache_memory_bytes"].value == 2 * 64 * 23_040


def test_kv_cache_takes_at_most_half_of_the_memory_left_after_weights() -> None:
    made = plan(machine=replace(HOST, free=2 * GIB + GIB // 4))
    assert origin_and_value(made, "kv_cache_memory_bytes") == (Origin.MACHINE, GIB)
    assert made["kv_cache_memory_bytes"].reason == "1.0 GiB: half of the 2.0 GiB left free by the weights"


def test_kv_cache_for_one_sequence_is_requested_even_if_memory_is_short() -> None:
    chosen = plan(machine=replace(HOST, free=0))
    assert chosen["kv_cache_memory_bytes"].value == 2048 * 23_040


def test_kv_cache_defaults_to_a_few_gib_when_memory_per_token_is_unknown() -> None:
    assert origin_and_value(plan(model=ModelFacts()), "kv_cache_memory_bytes") == (Origin.DEFAULT, 4 * GIB)


def test_configured_kv_cache_size_overrides_the_computed_size() -> None:
    assert origin_and_value(plan(kv_cache_gib=1.5), "kv_cache_memory_bytes") == (Origin.SETTING, 3 * GIB // 2)


def test_engine_arguments_affect_the_computed_kv_cache_size() -> None:
    chosen = plan(args=("--max-model-len", "1024", "--max-num-seqs=1", "--block-size", "16"))
    assert chosen["kv_cache_memory_bytes"].value == 2 * 1024 * 23_040


def test_float32_doubles_the_kv_cache_size() -> None:
    wide = plan(args=("--dtype", "float32"))["kv_cache_memory_bytes"].value
    assert isinstance(wide, int)
    assert wide / 2 == plan()["kv_cache_memory_bytes"].value


def test_gpu_memory_argument_is_not_overridden_by_a_configured_kv_cache_size() -> None:
    chosen = plan(args=("--gpu-memory-utilization", "0.4"), kv_cache_gib=2)
    assert chosen["kv_cache_memory_bytes"].origin is Origin.ARGS
    assert "--kv-cache-memory-bytes" not in chosen.arguments


def test_configured_context_length_is_capped_at_the_model_context_length() -> None:
    assert origin_and_value(plan(max_model_len=9000), "max_model_len") == (Origin.MODEL, 8192)


def test_engine_plan_distinguishes_settings_from_defaults() -> None:
    assert plan(max_model_len=2048)["max_model_len"].origin is Origin.SETTING
    assert plan()["max_model_len"].origin is Origin.DEFAULT


def gpus(count: int, gpu: Gpu = H100) -> Machine:
    return replace(HOST, gpus=(gpu,) * count)


@pytest.mark.parametrize(("count", "ranks"), [(0, 1), (1, 1), (2, 1), (3, 3), (4, 3), (8, 3)])
def test_tensor_parallel_size_is_the_largest_gpu_count_that_divides_the_number_of_attention_heads(
    count: int, ranks: int
) -> None:
    assert plan(GPU, gpus(count))["tensor_parallel_size"].value == ranks


def test_quantization_groups_are_not_split_across_gpus() -> None:
    assert plan(GPU, gpus(3), replace(MODEL, group_size=128))["tensor_parallel_size"].value == 1


def test_model_with_unknown_head_count_is_not_split_across_gpus() -> None:
    assert plan(GPU, gpus(4), ModelFacts())["tensor_parallel_size"].value == 1


@pytest.mark.parametrize("args", [("-pp", "3"), ("--data-parallel-size=3",)])
def test_tensor_parallel_size_leaves_enough_gpus_for_pipeline_or_data_parallelism(args: tuple[str, ...]) -> None:
    assert plan(GPU, gpus(8), args=args)["tensor_parallel_size"].value == 1
    assert plan(GPU, gpus(9), args=args)["tensor_parallel_size"].value == 3


def test_configured_tensor_parallel_size_overrides_the_computed_one() -> None:
    assert origin_and_value(plan(GPU, gpus(4), tensor_parallel=2), "tensor_parallel_size") == (Origin.SETTING, 2)


def test_engine_uses_90_percent_of_the_memory_of_an_idle_gpu() -> None:
    assert origin_and_value(plan(GPU, gpus(1)), "gpu_memory_utilization") == (Origin.MACHINE, 0.9)


def test_engine_uses_only_free_memory_on_a_shared_gpu() -> None:
    busy = replace(H100, free=40 * GIB)
    assert plan(GPU, gpus(1, busy))["gpu_memory_utilization"].value == 0.49


def test_gpu_with_the_least_free_memory_sets_the_memory_share() -> None:
    machine = replace(HOST, gpus=(H100, replace(H100, free=20 * GIB)))
    assert plan(GPU, machine, tensor_parallel=2)["gpu_memory_utilization"].value == 0.24
    assert plan(GPU, machine, tensor_parallel=1)["gpu_memory_utilization"].value == 0.9


def test_engines_share_the_memory_of_one_gpu() -> None:
    assert plan(GPU, gpus(1), engines=2)["gpu_memory_utilization"].value == 0.45
    assert plan(GPU, gpus(1), engines=3)["gpu_memory_utilization"].value == 0.3


def test_configured_gpu_memory_share_overrides_the_computed_one() -> None:
    assert origin_and_value(plan(GPU, gpus(1), gpu_memory_share=0.3), "gpu_memory_utilization") == (Origin.SETTING, 0.3)


def test_gpu_memory_share_is_left_to_vllm_when_no_gpu_is_visible() -> None:
    chosen = plan(GPU)
    assert chosen["gpu_memory_utilization"].origin is Origin.VLLM
    assert "--gpu-memory-utilization" not in chosen.arguments


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enable_chunked_prefill"])
def test_options_that_keep_their_vllm_default_are_shown_but_not_passed_to_vllm(name: str) -> None:
    chosen = plan(GPU, gpus(1))
    assert chosen[name].origin is Origin.VLLM
    assert chosen[name].arguments == ()


def test_flag_given_in_arguments_is_shown_in_the_engine_plan() -> None:
    chosen = plan(args=("--no-enable-prefix-caching",))
    assert origin_and_value(chosen, "enable_prefix_caching") == (Origin.ARGS, False)


@pytest.mark.parametrize(
    ("args", "value"),
    [(("--enforce-eager",), True), (("--no-enforce-eager",), False), (("--no_enforce_eager",), False)],
)
def test_arguments_override_the_compilation_default(args: tuple[str, ...], value: bool) -> None:
    chosen = plan(args=args)
    assert origin_and_value(chosen, "enforce_eager") == (Origin.ARGS, value)
    assert ("TORCHDYNAMO_DISABLE" in chosen.variables) is value
    assert "--enforce-eager" not in chosen.arguments


def test_compiled_kernels_are_stored_in_the_tuneserve_home() -> None:
    assert plan().variables["VLLM_CACHE_ROOT"] == str(CACHE)


def test_engine_plan_rows_are_available_as_text_and_json() -> None:
    rows = plan(kv_cache_gib=2).rows()
    assert next(row for row in rows if row["name"] == "kv_cache_memory_bytes") == {
        "name": "kv_cache_memory_bytes",
        "value": 2 * GIB,
        "origin": "setting",
        "reason": "2.0 GiB",
    }


sizes = st.integers(2**28, 2**42)
quotas = st.none() | st.floats(0.01, 512)
facts = st.builds(
    ModelFacts,
    weights=st.integers(0, 2**40),
    context=st.none() | st.integers(16, 2**20),
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
    heads=st.none() | st.integers(1, 128),
    kv_heads=st.none() | st.integers(1, 128),
    token_bytes=st.none() | st.integers(1, 2**22),
    divided_widths=st.just(()) | st.tuples(st.integers(1, 2**15), st.integers(1, 2**16)),
    group_size=st.none() | st.sampled_from([32, 64, 128]),
)


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    memory = draw(sizes)
    totals = draw(st.lists(sizes, max_size=9))
    return Machine(
        cores=tuple(sorted(draw(st.sets(st.integers(0, 511), min_size=1, max_size=64)))),
        quota=draw(quotas),
        memory=memory,
        free=draw(st.integers(0, memory)),
        gpus=tuple(Gpu("GPU", total, draw(st.integers(0, total))) for total in totals),
    )


OPTIONS = {
    "--max-model-len": "512",
    "--max-num-seqs": "3",
    "--dtype": "float16",
    "--block-size": "64",
    "--kv-cache-memory-bytes": "1000000",
    "--gpu-memory-utilization": "0.5",
    "--tensor-parallel-size": "2",
    "--seed": "1",
}


@pytest.mark.slow
@given(machines(), facts)
def test_kv_cache_size_is_positive_and_less_than_total_memory(machine: Machine, model: ModelFacts) -> None:
    size = plan(CPU, machine, model)["kv_cache_memory_bytes"].value
    assert isinstance(size, int)
    assert 0 < size < machine.memory


@given(machines(), facts)
def test_kv_cache_size_leaves_memory_for_the_weights(machine: Machine, model: ModelFacts) -> None:
    size = plan(CPU, machine, model)["kv_cache_memory_bytes"].value
    one_sequence = 2048 * (model.token_bytes or GIB)
    assert isinstance(size, int)
    assert size <= max((machine.free - model.weights) / 2, one_sequence)


@given(machines(), facts)
def test_threads_never_exceed_cores_or_cpu_quota(machine: Machine, model: ModelFacts) -> None:
    threads = plan(CPU, machine, model)["threads"].value
    assert isinstance(threads, int)
    assert 1 <= threads <= min(len(machine.cores), max(1, machine.quota or len(machine.cores)))


@pytest.mark.slow
@given(machines(), facts)
def test_tensor_parallel_size_splits_the_model_evenly_and_never_exceeds_the_number_of_gpus(
    machine: Machine, model: ModelFacts
) -> None:
    ranks = plan(GPU, machine, model)["tensor_parallel_size"].value
    assert isinstance(ranks, int)
    assert ranks == 1 or (ranks <= len(machine.gpus) and model.divides(ranks))


@pytest.mark.slow
@given(machines(), facts)
def test_gpu_memory_share_is_between_0_and_the_vllm_maximum(machine: Machine, model: ModelFacts) -> None:
    share = plan(GPU, machine, model)["gpu_memory_utilization"].value
    assert share == "auto" if not machine.gpus else isinstance(share, float) and 0 < share <= 0.9


@pytest.mark.slow
@given(machines(), facts, st.sampled_from([CPU, GPU]), st.sets(st.sampled_from(list(OPTIONS))), st.booleans())
def test_engine_plan_passes_no_argument_twice_and_attributes_user_arguments_to_the_user(
    machine: Machine, model: ModelFacts, device: Device, options: set[str], underscores: bool
) -> None:
    names = {name: f"--{name[2:].replace('-', '_')}" if underscores else name for name in options}
    args = tuple(f"{spelled}={OPTIONS[name]}" for name, spelled in names.items())
    chosen = plan(device, machine, model, args)
    passed = [argument for argument in chosen.arguments if argument.startswith("--")]
    assert len(passed) == len(set(passed))
    assert not set(passed) & options
    shown = {f"--{choice.name.replace('_', '-')}": choice.origin for choice in chosen.choices}
    assert all(shown[name] is Origin.ARGS for name in options & set(shown))


@pytest.mark.slow
@given(machines(), facts, st.sampled_from([CPU, GPU]))
def test_choices_in_an_engine_plan_have_unique_names(machine: Machine, model: ModelFacts, device: Device) -> None:
    names = [choice.name for choice in plan(device, machine, model).choices]
    assert len(names) == len(set(names))


GPTQ = replace(MODEL, quantization="gptq", group_size=64)


@pytest.mark.parametrize("able", [AVX2, AVX512_ALONE])
def test_merged_weights_are_served_in_float32_when_16_bit_dtypes_are_slow(able: DeviceCapabilities) -> None:
    chosen = plan(capabilities=able)
    assert origin_and_value(chosen, "dtype") == (Origin.MACHINE, "float32")
    assert chosen.arguments[chosen.arguments.index("--dtype") + 1] == "float32"


def test_float32_doubles_the_memory_of_16_bit_weights() -> None:
    tight = replace(HOST, free=GIB)
    small, wide = (plan(machine=tight, capabilities=able)["kv_cache_memory_bytes"] for able in (AVX512, AVX2))
    assert (small.value, wide.value) == ((GIB - MODEL.weights) // 2, (GIB - 2 * MODEL.weights) // 2)
    roomy, wide_roomy = (plan(capabilities=able)["kv_cache_memory_bytes"].value for able in (AVX512, AVX2))
    assert isinstance(roomy, int)
    assert wide_roomy == 2 * roomy


def test_weights_stored_in_float32_need_no_extra_memory_when_served_in_float32() -> None:
    assert weight_bytes(replace(MODEL, dtype="float32"), wide=True) == MODEL.weights


def test_gptq_uses_pytorch_kernel_in_bfloat16_when_vllm_has_no_kernel() -> None:
    chosen = plan(model=replace(GPTQ, dtype="float16"), capabilities=AVX2)
    assert origin_and_value(chosen, "gptq_kernel") == (Origin.MACHINE, "torch")
    assert origin_and_value(chosen, "dtype") == (Origin.MACHINE, "bfloat16")
    assert chosen.variables[INT4_LINEAR_VARIABLE] == "1"
    assert chosen.variables["VLLM_DISABLED_KERNELS"] == "CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"


@pytest.mark.parametrize(("device", "capabilities"), [(CPU, AMX), (GPU, HOPPER)])
def test_vllm_gptq_kernel_is_used_where_it_is_faster(device: Device, capabilities: DeviceCapabilities) -> None:
    chosen = plan(device, model=GPTQ, capabilities=capabilities)
    assert origin_and_value(chosen, "gptq_kernel") == (Origin.MACHINE, "vllm")
    assert origin_and_value(chosen, "dtype") == (Origin.MODEL, "bfloat16")
    assert not {INT4_LINEAR_VARIABLE, "VLLM_DISABLED_KERNELS"} & set(chosen.variables)
    assert "--dtype" not in chosen.arguments


def test_configured_pytorch_kernel_is_used_even_if_vllm_has_one() -> None:
    chosen = plan(model=GPTQ, gptq_kernel="torch")
    assert origin_and_value(chosen, "gptq_kernel") == (Origin.SETTING, "torch")
    assert chosen.variables[INT4_LINEAR_VARIABLE] == "1"


@pytest.mark.parametrize("capabilities", [AVX2, AMX])
def test_awq_uses_the_same_4_bit_kernel_as_gptq_on_a_cpu(capabilities: DeviceCapabilities) -> None:
    of_gptq, of_awq = (
        plan(model=replace(GPTQ, quantization=name), capabilities=capabilities) for name in ("gptq", "awq")
    )
    assert origin_and_value(of_awq, "gptq_kernel") == origin_and_value(of_gptq, "gptq_kernel")
    assert of_awq.variables == of_gptq.variables


def test_unquantized_model_needs_no_gptq_kernel() -> None:
    chosen = plan(capabilities=AVX2, gptq_kernel="vllm")
    assert "gptq_kernel" not in [choice.name for choice in chosen.choices]


def test_configured_dtype_overrides_the_computed_dtype() -> None:
    chosen = plan(capabilities=AVX2, args=("--dtype", "bfloat16"))
    assert origin_and_value(chosen, "dtype") == (Origin.ARGS, "bfloat16")


@pytest.mark.parametrize(
    ("capabilities", "value", "own", "taken"),
    [
        (AVX2, "float32", "bfloat16", False),
        (AVX2, "float16", "bfloat16", False),
        (AVX2, "auto", "float16", False),
        (AVX2, "auto", "bfloat16", True),
        (AVX2, "bfloat16", "float16", True),
        (AMX, "float32", "bfloat16", False),
        (AMX, "half", "bfloat16", True),
        (AMX, "auto", None, True),
    ],
)
def test_gptq_with_a_dtype_that_vllm_does_not_support_is_rejected(
    capabilities: DeviceCapabilities, value: str, own: str | None, taken: bool
) -> None:
    with nullcontext() if taken else pytest.raises(EngineError, match=f"--dtype {value}, which"):
        plan(capabilities=capabilities, model=replace(GPTQ, dtype=own), args=("--dtype", value))
    plan(capabilities=capabilities, args=("--dtype", value))


def test_gptq_without_a_usable_kernel_is_rejected_before_engine_start() -> None:
    with pytest.raises(EngineError, match="no GPTQ kernel"):
        plan(model=GPTQ, capabilities=AVX2, gptq_kernel="vllm")
