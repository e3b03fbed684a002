"""`svc plan` calculates how many replicas a load needs, from measured or estimated step times."""

import asyncio
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svc.errors import SettingsError
from svc.invocation import json_option, print_json, settings_of
from svc.version import SERVED_FORMATS, Format

if TYPE_CHECKING:
    from serving.sizing.plan import Plan
    from serving.sizing.service_times import MeasuredTimes, StepTimes
    from svc.engine.gpus import ListedGpu
    from svc.settings.settings import Settings

_GIB = 2**30
_PROMPT, _ANSWER = 800, 200


class _Seconds(click.ParamType[float]):
    """click parameter type for a positive number of seconds, such as 2s, 1.5s or 800ms."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse the option's value and return the seconds."""
        text = str(value)
        number, factor = (text[:-2], 0.001) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
        try:
            seconds = float(number) * factor
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= 86_400:
            self.fail(f"{text!r} is not a duration; expected for example 2s or 800ms", param, ctx)
        return seconds


class _Number(click.FloatRange):
    """click parameter type for a number in a range. It rejects `nan`, which click accepts in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse the option's value and return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


_positive = click.IntRange(1, 1_000_000)


@click.command()
@click.option(
    "--model", metavar="SIZE|FOLDER", help="Number of parameters, such as 8b, or a folder with a config.json."
)
@click.option("--gpu", metavar="NAME", help="GPU of a replica, such as h100; see svc/engine/gpus.yaml.")
@click.option(
    "--times", type=click.Path(path_type=Path), help="File with a measurement to use instead of published figures."
)
@click.option("--rps", type=_Number(0, 10_000, min_open=True), help="Requests per second.")
@click.option(
    "--prompt", type=_positive, default=_PROMPT, show_default=True, help="Mean length of a prompt, in tokens."
)
@click.option(
    "--answer", type=_positive, default=_ANSWER, show_default=True, help="Mean length of an answer, in tokens."
)
@click.option(
    "--spread",
    type=_Number(0, 5),
    default=0.0,
    show_default=True,
    help="Coefficient of variation (standard deviation divided by mean) of prompt lengths and of answer lengths.",
)
@click.option("--p95", type=_Seconds(), metavar="TIME", help="Time within which 95% of the answers must be complete.")
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "16"]),
    help="Bits per weight.  [default: as in FOLDER's weight files, or 16]",
)
@click.option(
    "--reload",
    "reload_s",
    type=_Seconds(),
    metavar="TIME",
    help="Duration of an in-place reload.  [default: estimated]",
)
@click.option(
    "--price",
    type=_Number(0),
    metavar="DOLLARS",
    help="Price per GPU hour, in dollars.  [default: as in svc/engine/gpus.yaml]",
)
@click.option(
    "--measure",
    "target",
    metavar="NAME@N|URL",
    help="Instead of planning, measure a version or the endpoint https://HOST/v1#MODEL.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice([format.value for format in SERVED_FORMATS]),
    help="Format of the version to measure.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("times.json"), help="File to write the measurement to."
)
@click.option("--endpoint-key-file", type=click.Path(path_type=Path), help="File that holds the API key for the URL.")
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    target: str | None,
    format_name: str | None,
    out: Path,
    endpoint_key_file: Path | None,
    as_json: bool,
    **demand: Any,
) -> None:
    """Find out how many replicas a load needs, and what latency, memory and cost to expect.

    Engines are simulated with step times measured by --measure. Without measurements, step times are estimated from the
    GPU's published figures, which is less accurate. With --measure, a short load is sent to a running server, or to an
    engine that is started for a version; --prompt and --answer set the lengths of its prompts and answers.
    """
    settings = settings_of(ctx)
    if target is None:
        _plan(settings, as_json=as_json, **demand)
        return
    times = asyncio.run(_measure(settings, target, format_name, endpoint_key_file, demand["prompt"], demand["answer"]))
    times.write(out)
    if as_json:
        print_json(times.model_dump(mode="json"))
        return
    _print_times(times)
    click.echo(f"to use this measurement: svc plan --times {out} --rps 10 --p95 5s")


async def _measure(
    settings: "Settings", target: str, format_name: str | None, key_file: Path | None, prompt: int, answer: int
) -> "MeasuredTimes":
    from serving.rollout.initial_state import best_format
    from serving.sizing.measure import engine_client, levels, measure, server_client
    from svc.evaluation.endpoint import Endpoint
    from svc.identity.key_file import read_secret
    from svc.registry.registry import Registry
    from svc.terminal import counting, quiet_libraries
    from svc.version import Target

    quiet_libraries()
    if answer < 2:
        raise SettingsError("--answer is 1", expected="at least 2 tokens, to measure the time between tokens")
    if "://" in target:
        key = read_secret(key_file, "get a new key from the provider") if key_file else None
        opened, label = server_client(Endpoint.parse(target, key)), target
        concurrency = settings.engine.max_concurrency
    else:
        registry = Registry.of(settings)
        version = registry.resolve(target)
        format = Format(format_name) if format_name else best_format(registry, version)
        opened, label = engine_client(settings, Target(version, format)), f"{version} ({format})"
        concurrency = settings.engine_for(version.name).max_concurrency
    async with opened as client:
        with counting("measurement", len(levels(concurrency)) + 2) as on_step:
            return await measure(
                client, prompt=prompt, answer=answer, concurrency=concurrency, label=label, on_step=on_step
            )


def _plan(
    settings: "Settings",
    *,
    model: str | None,
    gpu: str | None,
    times: Path | None,
    rps: float | None,
    prompt: int,
    answer: int,
    spread: float,
    p95: float | None,
    bits: str | None,
    reload_s: float | None,
    price: float | None,
    as_json: bool,
) -> None:
    from serving.sizing.model_size import read_model_size
    from serving.sizing.plan import choose_gpus, make_plan
    from serving.sizing.service_times import MeasuredTimes, Roofline
    from serving.sizing.simulation import Workload
    from svc.engine.gpus import read_gpus

    if rps is None or p95 is None:
        raise click.UsageError("--rps and --p95 are required")
    listed = read_gpus()
    if gpu is not None and gpu not in listed:
        raise SettingsError(
            f"unknown GPU {gpu!r}", expected=", ".join(listed), todo="add the GPU to svc/engine/gpus.yaml"
        )
    device = listed[gpu] if gpu else None
    size = read_model_size(model, int(bits) if bits else None) if model else None
    gpus, memory = choose_gpus(size, device, prompt + answer) if size and device else (1, None)
    workload = Workload(rps, prompt, answer, spread)
    step_times: StepTimes
    if times:
        step_times = MeasuredTimes.read(times)
    elif size and device:
        step_times = Roofline(device, size, gpus)
    else:
        raise click.UsageError("either --times, or both --model and --gpu are required")
    result = make_plan(workload, p95, step_times, settings.engine.max_concurrency, memory, reload_s)
    dollars = price if price is not None else device.dollars if device else None
    per_hour = None if dollars is None else dollars * result.replicas * gpus
    warning = _warning(step_times, workload)
    if as_json:
        print_json({"times": step_times.label, **asdict(result), "dollars_per_hour": per_hour, "warning": warning})
        return
    _print_plan(result, step_times.label, device)
    if per_hour is not None:
        source = "" if price is not None or device is None else f" ({device.price_source})"
        click.echo(f"cost       {per_hour:,.2f} dollars per hour, {dollars:g} per GPU{source}")
    if warning:
        click.secho(f"warning: {warning}", fg="yellow", err=True)


def _warning(times: "StepTimes", workload: Any) -> str | None:
    from serving.sizing.plan import differs_from_measurement

    if differs_from_measurement(workload, times):
        return "the measured requests have different lengths: measure again with these --prompt and --answer"
    return None


def _print_plan(plan: "Plan", label: str, device: "ListedGpu | None") -> None:
    latency, rollout, memory = plan.latency, plan.rollout, plan.memory
    each = f", each on {plan.gpus} x {device.label}" if device else ""
    lines = [
        f"times      {label}",
        f"replicas   {plan.replicas}{each}, without a spare replica",
        f"latency    p50 {latency.p50:.2f} s, p95 {latency.p95:.2f} s; on an idle replica {plan.idle_s:.2f} s",
        f"           to first token p50 {latency.first_p50:.2f} s, p95 {latency.first_p95:.2f} s",
    ]
    if memory:
        lines.append(
            f"memory     per replica {memory.weights / _GIB:.1f} GiB of weights, and a KV cache of "
            f"{memory.cache / _GIB:.1f} GiB for {memory.cache_tokens:,.0f} tokens"
        )
    lines += [
        f"rollout    one replica after the other reloads in {rollout.reload_s:.1f} s: {rollout.seconds:.0f} s, p95 "
        f"{rollout.latency.p95:.2f} s, longest wait for the first token {rollout.longest_wait_s:.2f} s",
    ]
    if memory:
        second = (
            "fits on the same GPUs" if memory.second_engine else f"needs {plan.gpus} more GPU{'s'[: plan.gpus > 1]}"
        )
        lines.append(f"           a second engine during a rollout (blue-green, candidate) {second}")
    click.echo("\n".join(lines))


def _print_times(times: "MeasuredTimes") -> None:
    from svc.terminal import print_table

    print_table(
        ("running answers", "step", "tokens/s"),
        [
            (point.count, f"{point.seconds * 1000:.1f} ms", f"{point.count / point.seconds:.0f}")
            for point in times.decoding
        ],
    )
    click.echo(
        f"prompt processing: {1 / max(times.prefill_token_s, 1e-9):,.0f} tokens/s; "
        f"overhead per request: {times.overhead_s * 1000:.0f} ms"
    )
