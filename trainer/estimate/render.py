"""Prints an estimate as tables or as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Column, Table

from svc.terminal import console, output
from trainer.estimate.advice import advise, as_text
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.estimate import DeviceEstimate, Estimate
from trainer.estimate.memory import Part
from trainer.estimate.stages import EnginePart, Need
from trainer.recipe.adapter import PISSA
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage

_GB = 1e9


def print_estimate(estimate: Estimate) -> None:
    """Print an estimate: memory by purpose and by stage, one line per device, and changes that would make the
    recipe fit.
    """
    _print_head(estimate)
    output.print(_parts_table(estimate.devices))
    output.print(_stages_table(estimate.devices))
    output.print(_devices_table(estimate.devices))
    for on_device in estimate.devices:
        advice = [] if on_device.fits else [advice_text(estimate, on_device.device)]
        for text in (*advice, *lacking(on_device)):
            output.print(f"{on_device.device.label}: {text}")
    for on_device in estimate.devices:
        if on_device.sharded:
            output.print(f"{on_device.device.label}: {_divided(on_device)}")
    several = any(one.device.count > 1 for one in estimate.devices)
    each = "GPU memory and the largest batch are per GPU." if several else ""
    output.print(f"Disk: {_size(estimate.disk)}, excluding the base. Time and cost cover only training. {each}".strip())


def print_short(estimate: Estimate) -> None:
    """Print the short estimate that `svc train` shows before it starts."""
    here = estimate.here
    console.print(
        f"  estimate: {_size(here.memory)} of memory ({_size(here.device.memory)} free); training takes about "
        f"{_duration(here.seconds)}; {_size(estimate.disk)} on disk",
        soft_wrap=True,
    )
    if here.sharded:
        console.print(f"  {_divided(here)}")
    console.print(f"  {_learning_rate(estimate)}")
    advice = [] if here.fits else [f"training may not fit: {advice_text(estimate, here.device)}"]
    for text in (*advice, *lacking(here)):
        console.print(f"  [yellow]{text}[/yellow]", soft_wrap=True)


def _divided(estimate: DeviceEstimate) -> str:
    return f"weights, gradients and moments are sharded across {estimate.device.count} devices"


def lacking(estimate: DeviceEstimate) -> list[str]:
    """Return a sentence for each stage after training that needs more memory than is free on the device."""
    device = estimate.device
    free = {"of the GPU": device.memory, "of main memory": device.memory if device.cpu else device.ram}
    return [
        f"stage {stage.stage} needs about {_size(need)} {where}, but {_size(memory)} are free"
        for stage in estimate.stages
        for (where, memory), need in zip(free.items(), (stage.peak.device, stage.peak.ram), strict=True)
        if stage.stage is not Stage.TRAIN and memory is not None and need > memory
    ]


def advice_text(estimate: Estimate, device: ComputeDevice) -> str:
    """Return a sentence that names the changes needed for the recipe to fit on the device, or says that none
    would help.
    """
    changes = advise(estimate.recipe, estimate.shape, estimate.workload, device)
    if changes is None:
        return "no change to the recipe makes it fit; use a smaller base or another device"
    return f"fits with {as_text(changes)}"


def as_json(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as a JSON object, with values in bytes, seconds and dollars."""
    shape, workload = estimate.shape, estimate.workload
    return {
        "base": {
            "architecture": shape.architecture,
            "parameters": shape.parameters,
            "trained": estimate.trained,
            "notes": list(shape.notes),
        },
        "learning_rate": estimate.recipe.learning_rate(shape.hidden),
        "data": {"examples": workload.examples, "tokens": round(workload.tokens), "tokenizer": workload.counted},
        "disk": round(estimate.disk),
        "devices": [_device_json(estimate, on_device) for on_device in estimate.devices],
    }


def _device_json(estimate: Estimate, on_device: DeviceEstimate) -> dict[str, Any]:
    device, dollars = on_device.device, on_device.dollars
    return {
        "name": device.name,
        "label": device.label,
        "count": device.count,
        "sharded": on_device.sharded,
        "available": round(device.memory),
        "memory": round(on_device.memory),
        "parts": _rounded(on_device.parts),
        "engine": _rounded(on_device.engine),
        "ram": round(on_device.ram),
        "stages": [{"stage": stage.stage.value} | _rounded(asdict(stage.peak)) for stage in on_device.stages],
        "fits": on_device.fits,
        "engine_fits": on_device.engine_fits,
        "largest_batch": on_device.largest_batch,
        "seconds": round(on_device.seconds, 1),
        "dollars": None if dollars is None else round(dollars, 2),
        "changes": {} if on_device.fits else advise(estimate.recipe, estimate.shape, estimate.workload, device),
    }


def _rounded(figures: Mapping[Any, float]) -> dict[str, int]:
    return {str(name): round(size) for name, size in figures.items()}


def _learning_rate(estimate: Estimate) -> str:
    recipe, width = estimate.recipe, estimate.shape.hidden
    default = (
        "" if recipe.train.learning_rate else f", the default for a hidden width of {width:,}{_lower_rate(recipe)}"
    )
    return f"learning rate {recipe.learning_rate(width):g}{default}"


def _lower_rate(recipe: Recipe) -> str:
    """Return a note on the lower learning rates published for PiSSA and LoRA+, or an empty string for other methods.

    The default rate does not take them into account, because their effect was not measured in this project, and
    LLaMA-Factory's examples use LoRA's rate for both methods.
    """
    if (recipe.adapter.init or "").startswith(PISSA):
        return "; PiSSA's authors used about a tenth of LoRA's rate"
    if recipe.train.lora_plus_ratio:
        return "; LoRA+'s authors advise about half of LoRA's rate for difficult tasks"
    return ""


def _print_head(estimate: Estimate) -> None:
    shape, workload, recipe = estimate.shape, estimate.workload, estimate.recipe
    kind = recipe.adapter_type.value if recipe.adapter_type else recipe.method.value
    quantized = f" on {recipe.base_quantization}" if recipe.base_quantization else ""
    output.print(
        f"{recipe.base}: {shape.parameters:,} parameters ({shape.architecture}); {kind}{quantized} trains "
        f"{estimate.trained:,} weights"
    )
    output.print(_learning_rate(estimate))
    counted = (
        "counted by its tokenizer"
        if workload.counted
        else "estimated at 4.2 characters each because the base has no tokenizer"
    )
    output.print(f"{workload.examples:,} examples, {workload.tokens:,.0f} tokens per epoch, {counted}")
    for note in shape.notes:
        output.print(f"[yellow]{note}[/yellow]")


def _parts_table(devices: Sequence[DeviceEstimate]) -> Table:
    table = Table("memory, GB", *(Column(one.device.label, justify="right") for one in devices), box=None)
    for part in Part:
        if any(one.parts.get(part) for one in devices):
            table.add_row(part.value, *(_cell(one.parts.get(part)) for one in devices))
    table.add_row("[bold]training[/bold]", *(_cell(one.memory) for one in devices))
    for engine_part in EnginePart:
        table.add_row(f"engine: {engine_part.value}", *(_cell(one.engine[engine_part]) for one in devices))
    table.add_row("[bold]engine[/bold]", *(_cell(sum(one.engine.values())) for one in devices))
    return table


def _stages_table(devices: Sequence[DeviceEstimate]) -> Table:
    """Return a table with one row per stage, in GB. For a GPU, each cell shows GPU memory and main memory, as in
    `9.5 + 2.1`.
    """
    titles = [one.device.label if one.device.cpu else f"{one.device.label} + RAM" for one in devices]
    table = Table("stage, GB", *(Column(title, justify="right") for title in (*titles, "disk")), box=None)
    for of_stage in zip(*(one.stages for one in devices), strict=True):
        cells = [_stage_cell(stage.peak, one.device) for stage, one in zip(of_stage, devices, strict=True)]
        disk = of_stage[0].peak.disk
        table.add_row(of_stage[0].stage, *cells, f"{disk / _GB:.1f}" if disk else "")
    return table


def _stage_cell(peak: Need, device: ComputeDevice) -> str:
    ram = f"{peak.ram / _GB:.1f}"
    return ram if device.cpu else f"{peak.device / _GB:.1f} + {ram}"


def _devices_table(devices: Sequence[DeviceEstimate]) -> Table:
    table = Table("device", "training fits", "engine fits", "memory, GB", "largest batch", "time", "cost", box=None)
    for one in devices:
        memory = f"{one.memory / _GB:.1f} of {one.device.memory / _GB:.1f}"
        fits = ["yes" if fits else "[red]no[/red]" for fits in (one.fits, one.engine_fits)]
        cost = "" if one.dollars is None else f"${one.dollars:.2f}"
        table.add_row(one.device.label, *fits, memory, str(one.largest_batch or "none"), _duration(one.seconds), cost)
    return table


def _cell(size: float | None) -> str:
    return f"{size / _GB:.2f}" if size else ""


def _size(size: float) -> str:
    return f"{size / _GB:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
