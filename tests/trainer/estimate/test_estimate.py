"""Tests estimates against published figures, and that the advice is correct."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from svc.engine.device import NumberType
from svc.errors import RecipeError
from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from trainer.estimate.advice import advise, as_text
from trainer.estimate.devices import read_devices
from trainer.estimate.estimate import DeviceEstimate, estimate_device, memory_on
from trainer.estimate.memory import Part
from trainer.estimate.stages import EnginePart, engine_memory
from trainer.recipe.recipe import Recipe

DEVICES = read_devices()
GIB = 2**30


def on(device: str, name: str, recipe: Recipe, examples: int = 1000, length: int = 2048) -> DeviceEstimate:
    return estimate_device(recipe, published(name), even_workload(examples, length, recipe), DEVICES[device], 4096)


def tokens_per_second(method: str, device: str, name: str, rows: int, length: int) -> float:
    recipe = make_recipe(method=method, train={"batch_size": rows}, adapter={"rank": 8})
    return 1000 * length / on(device, name, recipe, 1000, length).seconds


@pytest.mark.parametrize(
    ("name", "device", "examples", "hours", "factor"),
    [
        ("llama-2-7b", "rtx-4090", 1000, 2, 1.6),
        ("llama-2-7b", "rtx-4090", 10_000, 12, 1.6),
        ("llama-2-13b", "a100-40", 1000, 3, 2.2),
        ("llama-2-70b", "a100-80", 1000, 8, 1.6),
    ],
)
def test_estimated_training_hours_are_close_to_published_hours(
    name: str, device: str, examples: int, hours: float, factor: float
) -> None:
    recipe = make_recipe(method="qlora", train={"batch_size": 1, "epochs": 3})
    estimate = on(device, name, recipe, examples)
    assert estimate.fits
    assert hours / factor < estimate.seconds / 3600 < hours * factor


@pytest.mark.parametrize(
    ("method", "device", "name", "rows", "length", "published_speed", "factor"),
    [
        ("lora", "a100-40", "llama-2-7b", 4, 1024, 2392, 1.3),
        ("qlora", "a100-40", "llama-2-7b", 4, 1024, 2415, 1.3),
        ("lora", "rtx-4090", "llama-3.1-8b", 2, 2048, 3083, 2.6),
        ("qlora", "rtx-4090", "llama-3.1-8b", 2, 2048, 2413, 2.6),
    ],
)
def test_estimated_speed_is_close_to_published_speed(
    method: str, device: str, name: str, rows: int, length: int, published_speed: float, factor: float
) -> None:
    speed = tokens_per_second(method, device, name, rows, length)
    assert published_speed / factor < speed < published_speed * factor


@pytest.mark.parametrize(
    ("method", "name", "rows", "length", "gib"),
    [
        ("qlora", "llama-2-7b", 1, 1024, 6),
        ("qlora", "llama-2-7b", 1, 8192, 12),
        ("qlora", "llama-2-7b", 1, 32768, 32),
        ("qlora", "llama-2-7b", 4, 1024, 9),
        ("lora", "llama-2-7b", 4, 1024, 17),
        ("qlora", "llama-2-70b", 1, 512, 41),
        ("qlora", "llama-2-7b", 1, 512, 5),
    ],
)
def test_estimated_memory_is_within_20_percent_of_published_values(
    method: str, name: str, rows: int, length: int, gib: float
) -> None:
    recipe = make_recipe(method=method, train={"batch_size": rows, "max_length": length}, adapter={"rank": 8})
    estimate = on("h200", name, recipe, 100, length)
    assert estimate.memory / GIB == pytest.approx(gib, rel=0.2)


def test_largest_fitting_batch_would_not_fit_with_one_more_row() -> None:
    recipe, shape, device = make_recipe(method="qlora"), published("llama-3.1-8b"), DEVICES["rtx-4090"]
    workload = even_workload(1000, 2048, recipe)
    size = estimate_device(recipe, shape, workload, device, 4096).largest_batch
    assert memory_on(recipe, shape, workload.largest.resized(size), device) <= device.memory
    assert memory_on(recipe, shape, workload.largest.resized(size + 1), device) > device.memory


def pairs_of_device_and_model() -> Iterator[tuple[str, str, str]]:
    """Yield each device with each model, and each device and each model with each method."""
    methods = ["full", "lora", "qlora", "dora"]
    for row, device in enumerate(DEVICES):
        for column, name in enumerate(["llama-2-7b", "llama-2-13b", "llama-2-70b", "mixtral-8x7b"]):
            yield device, name, methods[(row + column) % len(methods)]


@pytest.mark.parametrize(("device", "name", "method"), pairs_of_device_and_model())
def test_recipe_fits_the_device_after_applying_the_proposed_changes(device: str, name: str, method: str) -> None:
    recipe, shape = make_recipe(method=method, train={"batch_size": 16, "max_length": 2048}), published(name)
    workload = even_workload(1000, 2048, recipe)
    changes = advise(recipe, shape, workload, DEVICES[device])
    if changes is None:
        kind = "dora" if method == "dora" else "lora"
        least = make_recipe(method=kind, quantization="nf4", adapter={"rank": 8}, train={"batch_size": 1})
        assert memory_on(least, shape, even_workload(1, 256, least).largest, DEVICES[device]) > DEVICES[device].memory
        return
    changed = recipe.changed(changes)
    size = changed.train.batch_size
    smaller = workload.largest.shortened(changed.train.max_length).resized(size)
    assert memory_on(changed, shape, smaller, DEVICES[device]) <= DEVICES[device].memory
    assert size * changed.train.gradient_accumulation == 16


def test_smaller_batch_with_more_gradient_accumulation_is_proposed_first() -> None:
    recipe = make_recipe(method="qlora", train={"batch_size": 16, "max_length": 2048})
    changes = advise(recipe, published("llama-3.1-8b"), even_workload(100, 2048, recipe), DEVICES["rtx-4090"])
    assert changes == {"train.batch_size": 8, "train.gradient_accumulation": 2}
    assert as_text(changes) == "train.batch_size=8, train.gradient_accumulation=2"


def test_no_advice_is_given_for_a_recipe_that_fits_the_device() -> None:
    recipe = make_recipe(method="qlora", train={"batch_size": 1})
    assert advise(recipe, published("llama-2-7b"), even_workload(100, 512, recipe), DEVICES["h100"]) == {}


@pytest.mark.parametrize(
    ("more", "less"),
    [({"epochs": 2}, {"epochs": 1}), ({"gradient_checkpointing": True}, {"gradient_checkpointing": False})],
)
def test_estimate_grows_with_the_amount_of_work(more: dict[str, Any], less: dict[str, Any]) -> None:
    longer, shorter = (
        on("a100-80", "llama-2-7b", make_recipe(train={"batch_size": 1, **train})).seconds for train in (more, less)
    )
    assert longer > 1.2 * shorter


def test_float32_engine_doubles_the_memory_for_weights() -> None:
    shape = published("mistral-7b")
    wide, narrow = (engine_memory(shape, number, 4096) for number in (NumberType.FLOAT32, NumberType.BFLOAT16))
    assert wide[EnginePart.WEIGHTS] == 2 * narrow[EnginePart.WEIGHTS] == 4 * shape.parameters


def test_8_bit_optimizer_is_proposed_before_lora_for_full_fine_tuning() -> None:
    """Llama 3.1 8B needs at least 128 GB in float32, and 48 GB less with 8-bit moments."""
    recipe, device = make_recipe(method="full", train={"batch_size": 1}), replace(DEVICES["h200"], memory=110e9)
    changes = advise(recipe, published("llama-3.1-8b"), even_workload(100, 512, recipe), device)
    assert changes == {"train.optimizer": "adamw-8bit"}


def test_paged_optimizer_is_proposed_when_an_8_bit_optimizer_does_not_fit() -> None:
    recipe, device = make_recipe(method="full", train={"batch_size": 1}), replace(DEVICES["h200"], memory=88e9)
    changes = advise(recipe, published("llama-3.1-8b"), even_workload(100, 512, recipe), device)
    assert changes == {"train.optimizer": "paged-adamw-8bit"}


def test_lora_is_proposed_without_changing_the_optimizer() -> None:
    recipe = make_recipe(method="full", train={"batch_size": 1})
    changes = advise(recipe, published("llama-3.1-8b"), even_workload(100, 512, recipe), DEVICES["rtx-4090"])
    assert changes == {"method": "lora"}


def several(name: str, count: int, recipe: Recipe) -> DeviceEstimate:
    device = replace(DEVICES["a100-80"], count=count)
    return estimate_device(recipe, published(name), even_workload(1000, 1024, recipe), device, 4096)


@pytest.mark.parametrize("sizes", [{"batch_size": 4, "gradient_accumulation": 4}, {"batch_size": 16}], ids=str)
def test_training_time_is_nearly_inversely_proportional_to_the_number_of_devices(sizes: dict[str, int]) -> None:
    one, four = (several("llama-2-7b", count, make_recipe(train=sizes)) for count in (1, 4))
    assert one.dollars
    assert four.dollars
    assert 3.5 < one.seconds / four.seconds < 4
    assert four.dollars == pytest.approx(one.dollars * 4 * four.seconds / one.seconds)


def test_unsharded_training_on_several_devices_doubles_only_the_gradient_memory_of_each_device() -> None:
    train = {"batch_size": 1, "gradient_accumulation": 4, "sharding": "never"}
    recipe = make_recipe(method="full", train=train)
    one, four = (several("llama-2-7b", count, recipe) for count in (1, 4))
    changed = {part for part in Part if one.parts.get(part, 0) != four.parts.get(part, 0)}
    assert changed == {Part.GRADIENTS}
    assert four.parts[Part.GRADIENTS] == 2 * one.parts[Part.GRADIENTS]
    assert four.least - one.least == one.parts[Part.GRADIENTS]


SINGLE_ROWS = {"batch_size": 1, "gradient_accumulation": 8}


def test_sharded_nf4_estimate_includes_all_scales_but_only_a_share_of_the_packed_weights_per_device() -> None:
    lora, qlora = (
        make_recipe(method=method, train=SINGLE_ROWS | {"sharding": "always"}) for method in ("lora", "qlora")
    )
    one, four, eight = (several("llama-2-7b", count, qlora) for count in (1, 4, 8))
    scales = 0.127 / 8 * published("llama-2-7b").linear_weights
    packed = one.parts[Part.QUANTIZED] - scales
    for count, divided in ((4, four), (8, eight)):
        assert divided.parts[Part.QUANTIZED] == pytest.approx(packed / count + scales)
    assert four.parts[Part.GATHERED] < several("llama-2-7b", 4, lora).parts[Part.GATHERED]
    assert one.least > four.least > eight.least


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_devices_with_sharded_weights_hold_their_shard_plus_gathered_layers(method: str) -> None:
    recipe = make_recipe(method=method, train=SINGLE_ROWS | {"sharding": "always"})
    one, four, eight = (several("llama-2-7b", count, recipe) for count in (1, 4, 8))
    assert [one.sharded, four.sharded, eight.sharded] == [False, True, True]
    for part in (Part.WEIGHTS, Part.ADAPTER, Part.GRADIENTS, Part.OPTIMIZER):
        assert four.parts.get(part, 0) == one.parts.get(part, 0) / 4
        assert eight.parts.get(part, 0) == one.parts.get(part, 0) / 8
    assert four.parts[Part.GATHERED] == eight.parts[Part.GATHERED] > 0
    assert one.least > four.least > eight.least > eight.parts[Part.GATHERED]


def test_gradient_accumulation_with_sharded_weights_takes_longer() -> None:
    few, many = (
        several("llama-2-7b", 4, make_recipe(method="full", train=batch | {"sharding": "always"}))
        for batch in ({"batch_size": 64}, {"batch_size": 4, "gradient_accumulation": 16})
    )
    copied = several("llama-2-7b", 4, make_recipe(method="full", train={"batch_size": 64, "sharding": "never"}))
    assert copied.seconds <= few.seconds < many.seconds


def test_weights_are_sharded_by_default_only_if_a_full_copy_does_not_fit() -> None:
    lora, full = (make_recipe(method=method, train=SINGLE_ROWS) for method in ("lora", "full"))
    assert not several("llama-2-7b", 8, lora).sharded
    assert not several("llama-2-7b", 1, full).fits
    divided = several("llama-2-7b", 8, full)
    assert divided.sharded
    assert divided.fits
    never = several("llama-2-7b", 8, full.changed({"train.sharding": "never"}))
    assert not never.sharded
    assert not never.fits


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"method": "adalora"}, "adalora"),
        ({"method": "full", "train": {"optimizer": "adamw-8bit"}}, "moments of adamw-8bit"),
    ],
    ids=str,
)
def test_estimate_says_why_weights_cannot_be_sharded(sections: dict[str, Any], reason: str) -> None:
    recipe = make_recipe(**sections | {"train": SINGLE_ROWS | sections.get("train", {})})
    estimated = several("llama-2-7b", 8, recipe)
    assert not estimated.sharded
    assert reason in (estimated.undivided or "")


def test_sharding_is_proposed_before_a_different_training_method() -> None:
    recipe = make_recipe(method="full", train=SINGLE_ROWS | {"sharding": "never"})
    device = replace(DEVICES["a100-80"], count=8)
    changes = advise(recipe, published("llama-2-7b"), even_workload(1000, 1024, recipe), device)
    assert changes == {"train.sharding": "auto"}


def test_activation_memory_per_device_shrinks_when_devices_split_a_batch() -> None:
    one, four = (several("llama-2-7b", count, make_recipe(train={"batch_size": 16})) for count in (1, 4))
    assert four.parts[Part.ACTIVATIONS] == pytest.approx(one.parts[Part.ACTIVATIONS] / 4, rel=0.05)


def test_two_processes_on_a_cpu_need_over_twice_the_memory_and_the_same_time_as_one_process() -> None:
    recipe = make_recipe(train={"batch_size": 4, "gradient_accumulation": 2, "sharding": "never"})
    one, two = (
        estimate_device(
            recipe, published("llama-2-7b"), even_workload(100, 256, recipe), replace(cpu_device(), count=count), 4096
        )
        for count in (1, 2)
    )
    assert two.memory > 2 * one.memory
    assert two.seconds == pytest.approx(one.seconds, rel=0.01)


def test_estimate_rejects_a_recipe_whose_batch_cannot_be_split_evenly_among_devices() -> None:
    with pytest.raises(RecipeError, match="16 x 1 examples cannot be divided among 3 devices"):
        several("llama-2-7b", 3, make_recipe())


def test_no_change_is_proposed_when_the_recipe_fits_on_several_devices() -> None:
    recipe, shape, device = make_recipe(train={"batch_size": 64}), published("llama-2-7b"), DEVICES["a100-40"]
    workload = even_workload(1000, 1024, recipe)
    assert advise(recipe, shape, workload, device)
    assert advise(recipe, shape, workload, replace(device, count=16)) == {}
