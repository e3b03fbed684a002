"""The command `svc compare`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svc.errors import SettingsError
from svc.invocation import json_option, print_json, settings_of
from svc.version import SERVED_FORMATS

if TYPE_CHECKING:
    from svc.evaluation.endpoint import Endpoint


@click.command()
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--data", multiple=True, metavar="FILE", help="Examples to send.  [default: the versions' held-out set]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Maximum number of examples to send.  [default: as many as the versions were evaluated on; with --data, all]",
)
@click.option(
    "--format",
    type=click.Choice([format.value for format in SERVED_FORMATS]),
    help="Format to use for versions.  [default: the format that `svc serve` would choose]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Maximum number of tokens per answer.  [default: the limit used to evaluate A (B if A is not a version); "
    "if there was none, a limit based on the length of each reference]",
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="Metric to compute.  [default: the metrics in the version's recipe; with --data, the metrics for the task]",
)
@click.option("--primary", metavar="NAME", help="Metric that decides which model is better.")
@click.option("--fresh", is_flag=True, help="Generate all answers again instead of reusing stored answers.")
@click.option("--endpoint-key-file", type=click.Path(path_type=Path), help="File that holds the endpoint's API key.")
@click.option("--endpoint-key-variable", metavar="NAME", help="Environment variable that holds the endpoint's API key.")
@click.option(
    "--judge-url",
    metavar="URL",
    help="OpenAI-compatible endpoint of a judge model. Prompts, references and both models' answers are sent to it.",
)
@click.option("--judge-model", metavar="NAME", help="Name of the judge model at that endpoint.")
@click.option("--judge-key-file", type=click.Path(path_type=Path), help="File that holds the judge's API key.")
@click.option("--fail-if-worse", is_flag=True, help="Exit with code 1 if B is significantly worse than A.")
@json_option
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    endpoint_key_file: Path | None,
    endpoint_key_variable: str | None,
    judge_url: str | None,
    judge_model: str | None,
    judge_key_file: Path | None,
    fail_if_worse: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Send the same examples to models A and B, and show which model answers better.

    A and B are versions (NAME, NAME@N, NAME@alias), base models as in a recipe, or remote models
    (https://HOST/v1#MODEL), to which the prompts are sent.
    """
    from svc.evaluation.comparison import Direction
    from svc.registry.registry import Registry
    from svc.terminal import quiet_libraries
    from trainer.evaluation.comparison.job import ComparisonJob, Wanted
    from trainer.evaluation.comparison.render import everything, print_compared

    quiet_libraries()
    settings, key = settings_of(ctx), _key(endpoint_key_file, endpoint_key_variable)
    judge = _judge(judge_url, judge_model, judge_key_file)
    compared = ComparisonJob(settings, Wanted(key=key, judge=judge, **wanted), Registry.of(settings)).run()
    if as_json:
        print_json(everything(compared))
    else:
        print_compared(compared)
    ctx.exit(1 if fail_if_worse and compared.comparison.direction is Direction.WORSE else 0)


def _judge(url: str | None, model: str | None, key_file: Path | None) -> "Endpoint | None":
    from svc.evaluation.endpoint import Endpoint

    if url and model:
        return Endpoint.with_key_file(url, model, key_file)
    if url or model or key_file:
        raise click.UsageError("--judge-url and --judge-model must be given together")
    return None


def _key(file: Path | None, variable: str | None) -> str | None:
    """Return the endpoint's API key, or None if no key is given. The key itself is never a command-line option, because
    any local user can read the options of a running command.
    """
    from svc.evaluation.endpoint import read_endpoint_key

    if file and variable:
        raise click.UsageError("--endpoint-key-file and --endpoint-key-variable cannot be combined")
    if not variable:
        return read_endpoint_key(file)
    key = os.environ.get(variable, "").strip()
    if not key:
        raise SettingsError(
            f"the environment variable {variable} is not set",
            expected="an environment variable that contains the endpoint's API key",
        )
    return key
