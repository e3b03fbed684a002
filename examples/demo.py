"""`make demo`: shows the whole workflow from end to end, on real data with the real engine.

    check -> train @1 -> train @2 -> serve @1 -> ask -> promote @2 under load -> roll back -> two bad
    versions -> a canary that is rolled back -> status

State is kept in .demo/. An interrupted demo continues where it stopped; after a finished demo, the next
one starts from scratch. With `--serve`, the two versions are trained if they are missing, and the server
is left running.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console
from rich.rule import Rule

from examples.duration import measure_machine
from examples.load import Load
from examples.service import Terminated, serving, svc, svc_json
from examples.tamper import alter_weights, replace_by_base, replace_weights
from svc.dataset.readers.reader import read_examples
from svc.errors import RolledBackError, SvcError
from svc.files.lock import lock_holder
from svc.registry.registry import Registry
from svc.registry.render import evaluation_table
from svc.remote.server_url import LOCK_FILE
from svc.settings.settings import Settings
from svc.terminal import quiet_libraries, waiting
from svc.version import VersionId
from trainer.base_model.resolve import resolve_base

ROOT = Path(__file__).parents[1]
TASK = ROOT / "examples" / "debian-triage"
HOME = ROOT / ".demo"
FINISHED = HOME / "finished"
NAME = "debian-triage"
BASE = "smollm2-135m-instruct"
PORT = 8000
STREAMS = 8
CANARY_STREAMS = 4  # fewer, because two engines share the machine
CANARY_TOKENS = 12  # enough for a correct answer; the bad version never ends by itself
ENVIRONMENT = {
    # A canary compares requests instead of users, who are observed for a minute each: the load is a batch job.
    "SVC_MODELS": json.dumps({NAME: {"rollout": {"unit": "request"}}}),
    "OMP_WAIT_POLICY": "PASSIVE",  # two engines on the same cores; see docs/rollouts.md
}
MIN_EXACT_MATCH = 0.65
BAD_VERSIONS = {3: "weights altered after registration", 4: "another model's weights, hashes recomputed"}

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 120


class DemoError(SvcError):
    """Raised when a step of the demo does not produce the expected result."""


@dataclass
class Summary:
    """Results of the demo, one line each."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, title: str, result: str) -> None:
        """Record and print a result."""
        self.lines.append((title, result))
        console.print(f"  {title}: {result}", markup=False, soft_wrap=True)


def main() -> None:
    """Run the demo, or only its server with `--serve`."""
    started = time.monotonic()
    quiet_libraries()
    stay = "--serve" in sys.argv[1:]
    end_orphaned_server()
    if FINISHED.exists() and not stay:
        shutil.rmtree(HOME)
    summary = Summary()
    check_data()
    if not stay and not (HOME / "models").exists():
        say_duration()
    train_versions(summary)
    if stay:
        run("serve", NAME, "--port", str(PORT))
        return
    with ExitStack() as stack:
        with waiting(f"starting the server with {NAME}@1"):
            url = stack.enter_context(serving(HOME, f"{NAME}@1", PORT, environment=ENVIRONMENT))
        prompts = [[message.as_dict() for message in e.prompt] for e in read_examples(TASK / "heldout.jsonl")[:24]]
        ask(url, prompts, summary)
        promote_and_roll_back(url, prompts, summary)
        refuse_bad_versions(url, prompts, summary)
        roll_back_by_canary(url, prompts, summary)
        heading("status")
        run("status")
    show_summary(summary, time.monotonic() - started)
    FINISHED.touch()


def end_orphaned_server() -> None:
    """Stop a server left by `make serve` or a killed demo, because it holds the home and the port."""
    holder = lock_holder(HOME / LOCK_FILE)
    if holder:
        console.print(f"stopping the server on {HOME} (process {holder['pid']})", markup=False, soft_wrap=True)
        os.kill(holder["pid"], signal.SIGTERM)
        psutil.Process(holder["pid"]).wait(60)


def check_data() -> None:
    """Show the data and verify that no held-out example is among the training examples."""
    heading("1. the data")
    run("data", "check", str(TASK / "train.jsonl"), "--heldout", str(TASK / "heldout.jsonl"))


def say_duration() -> None:
    """Print an estimate of the demo's duration on this machine."""
    with waiting("measuring this machine"):
        machine = measure_machine(HOME)
    console.print(
        f"the demo will take about {machine.demo_minutes:.0f} minutes on this machine, which multiplies matrices in "
        f"{machine.number_type} at {machine.speed / 1e9:.0f} GFLOP/s and loads torch in {machine.import_s:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def train_versions(summary: Summary) -> None:
    """Train @1 and @2, and check the exact match score of @1."""
    for number, recipe in ((1, "recipe.yaml"), (2, "recipe-v2.yaml")):
        heading(f"{number + 1}. {NAME}@{number}: train, evaluate, merge, quantize, qualify, register")
        started = time.monotonic()
        run("train", str(TASK / recipe))
        summary.add(f"{NAME}@{number}", f"trained in {time.monotonic() - started:.0f} s")
    evaluated = svc_json(HOME, "show", f"{NAME}@1")["formats"]
    merged, gptq = (evaluated[name]["evaluation"]["exact_match"]["value"] for name in ("merged", "gptq"))
    if min(merged, gptq) < MIN_EXACT_MATCH:
        raise DemoError(
            f"exact match is {merged} for the merged model, {gptq} for the quantized model",
            expected=f"at least {MIN_EXACT_MATCH}",
        )


def ask(url: str, prompts: list[list[dict[str, str]]], summary: Summary) -> None:
    """Send requests with the official client, without modifying it."""
    heading("4. requests from the openai client")
    messages: Any = prompts[0]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        raw = client.chat.completions.with_raw_response.create(model=NAME, messages=messages, max_tokens=24)
        answer = raw.parse().choices[0].message.content
        streamed = client.chat.completions.with_raw_response.create(
            model=NAME, messages=messages, max_tokens=24, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed.parse()]
    console.print(f"  question: {messages[-1]['content'][:90]}…", markup=False, soft_wrap=True)
    summary.add("answer", f"{answer}  (x-model-version: {raw.headers['x-model-version']})")
    summary.add("streamed", f"{''.join(pieces)}  in {len(pieces)} events ({streamed.headers['x-model-version']})")


def promote_and_roll_back(url: str, prompts: list[list[dict[str, str]]], summary: Summary) -> None:
    """Promote the other version and roll back, while streams run."""
    heading(f"5. promote {NAME}@2 and roll back, with {STREAMS} concurrent streams")
    with Load(url, NAME, prompts, streams=STREAMS) as load:
        load.wait_for(2 * STREAMS)
        for command in (("promote", f"{NAME}@2"), ("rollback", NAME)):
            with waiting(f"svc {' '.join(command)}"):
                swap = svc_json(HOME, *command)
            summary.add(
                " ".join(command),
                f"admission closed for {swap['queued_s']:.2f} s, {swap['running']} requests in flight, "
                f"{swap['queued']} queued",
            )
            load.wait_for(2 * STREAMS)
    report_load(load, summary, {f"{NAME}@1", f"{NAME}@2"})


def refuse_bad_versions(url: str, prompts: list[list[dict[str, str]]], summary: Summary) -> None:
    """Try to promote two bad versions while streams are running."""
    heading("6. two bad versions")
    folders = {number: HOME / "models" / NAME / str(number) for number in range(1, 5)}
    for number in (3, 4):
        shutil.rmtree(folders[number], ignore_errors=True)
    alter_weights(folders[2], folders[3], "gptq")
    replace_weights(folders[2], folders[4], "gptq", weights_of=folders[1])
    with Load(url, NAME, prompts, streams=STREAMS) as load:
        load.wait_for(STREAMS)
        for number, kind in BAD_VERSIONS.items():
            with waiting(f"svc promote {NAME}@{number}"):
                refused = svc(HOME, "promote", f"{NAME}@{number}", capture_output=True)
            console.print(refused.stderr.rstrip(), markup=False, soft_wrap=True)
            if refused.returncode == 0:
                raise DemoError(f"{NAME}@{number} ({kind}) was promoted", expected="a refused promotion")
            why = next(line for line in refused.stderr.splitlines() if "why:" in line)
            summary.add(
                f"@{number}, {kind}",
                f"refused, exit code {refused.returncode};{why.split('why:')[1].replace(f'{HOME}/', '')[:90]}",
            )
            load.wait_for(STREAMS)
    report_load(load, summary, {f"{NAME}@1"})
    if svc_json(HOME, "status")["models"][0]["version"] != f"{NAME}@1":
        raise DemoError("the production version changed", expected=f"{NAME}@1")


def roll_back_by_canary(url: str, prompts: list[list[dict[str, str]]], summary: Summary) -> None:
    """Try a version with good metrics but bad answers on half of the requests; it is rolled back automatically."""
    heading("7. a version that is good on paper and bad in traffic")
    folders = {number: HOME / "models" / NAME / str(number) for number in (1, 5)}
    shutil.rmtree(folders[5], ignore_errors=True)
    with waiting(f"making {NAME}@5: the base's weights with the metrics of {NAME}@1"):
        replace_by_base(folders[1], folders[5], resolve_base(BASE, Settings().base_cache).folder)
    with Load(url, NAME, prompts, streams=CANARY_STREAMS, max_tokens=CANARY_TOKENS) as load:
        load.wait_for(CANARY_STREAMS)
        command = ("promote", f"{NAME}@5", "--format", "merged", "--canary", "50,100")
        with waiting(f"svc {' '.join(command)}"):
            ended = svc(HOME, *command, capture_output=True)
        console.print(ended.stderr.rstrip(), markup=False, soft_wrap=True)
        if ended.returncode != RolledBackError.exit_code:
            raise DemoError(
                f"svc promote {NAME}@5 exited with code {ended.returncode}",
                expected=f"a rollback: exit code {RolledBackError.exit_code}",
            )
        load.wait_for(CANARY_STREAMS)
    why = next(line for line in ended.stderr.splitlines() if "why:" in line)
    exposed = sum(answer.version == f"{NAME}@5" for answer in load.answers)
    summary.add("@5, bad in traffic", f"rolled back after answering {exposed} requests;{why.split('why:')[1][:90]}")
    report_load(load, summary, {f"{NAME}@1", f"{NAME}@5"})


def report_load(load: Load, summary: Summary, versions: set[str]) -> None:
    """Report the load's results, and check that no request failed or was answered by an unexpected version."""
    seen = {answer.version for answer in load.answers if not answer.error}
    slowest = max(answer.seconds for answer in load.answers)
    summary.add(
        "load",
        f"{len(load.answers)} requests, {len(load.failed)} failed, slowest {slowest:.1f} s, answered by {sorted(seen)}",
    )
    if load.failed or seen != versions:
        raise DemoError(
            f"failed requests: {load.failed[:3]}; versions that answered: {sorted(seen)}",
            expected=f"no failed requests, and answers from {sorted(versions)}",
        )


def show_summary(summary: Summary, seconds: float) -> None:
    """Print the demo's results on one screen."""
    heading("summary")
    registry = Registry.of(Settings(home=HOME))
    for number in (1, 2):
        manifest = registry.manifest(VersionId(NAME, number))
        console.print(
            f"\n{manifest.id}, from {manifest.base.origin}, evaluated on {manifest.judged_examples} held-out examples",
            markup=False,
        )
        console.print(evaluation_table(manifest))
    console.print()
    for title, result in summary.lines:
        console.print(f"  {title}: {result}", markup=False, soft_wrap=True)
    console.print(
        f"\nfinished in {seconds / 60:.1f} minutes; all processes have been stopped, and the state is in {HOME}",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"to view the versions: SVC_HOME={HOME.name} .venv/bin/svc ui    to serve them: make serve",
        markup=False,
        soft_wrap=True,
    )


def run(*arguments: str) -> None:
    """Run a command and show it to the user.

    Raises:
        DemoError: the command failed.
    """
    console.print(f"$ svc {' '.join(arguments)}", style="cyan", markup=False, soft_wrap=True)
    sys.stdout.flush()
    completed = svc(HOME, *arguments)
    if completed.returncode:
        raise DemoError(
            f"svc {arguments[0]} exited with code {completed.returncode}",
            todo="read the error above, then run `make demo` again",
        )


def heading(text: str) -> None:
    """Print the heading of a demo section."""
    console.print(Rule(text, align="left", characters="-"))


if __name__ == "__main__":
    Terminated.on_sigterm()
    try:
        main()
    except (SvcError, RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; `make demo` will continue from here")
        sys.exit(130)
