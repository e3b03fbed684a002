"""Tests `svc sweep` and `svc train --curve` on a tiny model, and a sweep that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from svc.dataset.readers.reader import write_examples
from svc.engine import device as capabilities
from svc.errors import InterruptedRunError, TrainingError
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from tests.command_line import Ended, Svc
from tests.svc.engine.devices import AVX512
from tests.trainer.conftest import make_example
from trainer.pipeline import stages
from trainer.recipe.file import load_recipe
from trainer.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = """
name: {name}
base: {base}
data: {{train: train.jsonl, heldout: heldout.jsonl}}
train: {{batch_size: 8, learning_rate: 1.0e-3}}
adapter: {{rank: 4}}
sweep:
  finalists: 0
  space: {{train.learning_rate: [1.0e-2, 1.0e-3], adapter.rank: [2, 4]}}
"""


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path) -> Path:
    colours = ["red", "blue", "green"]
    examples = [make_example(f"number {'x' * (number % 9)} {number}", colours[number % 3]) for number in range(50)]
    write_examples(tmp_path / "train.jsonl", examples[:40])
    write_examples(tmp_path / "heldout.jsonl", examples[40:])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(name=f"sweep-{abs(hash(request.node.name)) % 10**6}", base=tiny_base), "utf-8")
    return path


@pytest.fixture
def run(svc: Svc, tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Without an artifact location MLflow would put files below the working folder of the tests.
    monkeypatch.setattr(Registry, "of", lambda settings: Registry(settings.home / "models", tracking))
    monkeypatch.setattr(capabilities, "read_capabilities", lambda home: AVX512)

    def run(*arguments: str | Path) -> Ended:
        return svc("--home", tmp_path / "home", *arguments)

    return run


def children(tracking: Tracking, experiment: str) -> list[Any]:
    client = MlflowClient(tracking.uri)
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    return [run for run in client.search_runs([stored.experiment_id]) if "mlflow.parentRunId" in run.data.tags]


def test_sweep_saves_its_results_and_the_winning_recipe(
    recipe: Path, run: Any, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run("sweep", recipe, "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    spaced = [trial for trial in result["trials"] if trial["phase"] == "own space"]
    assert len(spaced) == 4
    assert result["winner"]["train.learning_rate"] == 1e-2
    assert result["loss"]["value"] < result["recipe"]["value"] < result["base"]["value"]
    assert Path(result["picture"]).read_text("utf-8").lstrip().startswith("<?xml")
    won = load_recipe(Path(result["folder"]) / "winner.yaml")
    assert (won.train.learning_rate, won.rank) == (1e-2, result["winner"]["adapter.rank"])
    assert won.data == load_recipe(recipe).data
    runs = children(tracking, f"{won.name}-sweep")
    assert len(runs) == 4  # one of them is the unchanged recipe
    assert {run.info.status for run in runs} == {"FINISHED"}
    files = MlflowClient(tracking.uri).list_artifacts(runs[0].data.tags["mlflow.parentRunId"])
    assert {file.path for file in files} == {"result.json", "trials.svg", "winner.yaml"}
    table = run("sweep", recipe)
    assert "winner: learning_rate 0.01" in table.out
    assert "--set train.learning_rate=0.01" in table.out

    def pipeline(settings: Any, capabilities: Any, registry: Any, winner: Recipe, *others: Any, node: None) -> Any:
        assert (winner.train.learning_rate, winner.rank) == (won.train.learning_rate, won.rank)
        raise TrainingError("the winner is trained")

    monkeypatch.setattr(stages, "Pipeline", pipeline)
    assert "the winner is trained" in run("sweep", recipe, "--register").err


@pytest.mark.parametrize("command", [("sweep",), ("train", "--curve")])
def test_sweep_and_learning_curve_are_refused_for_preference_objectives(
    command: tuple[str, ...], recipe: Path, run: Any
) -> None:
    ended = run(command[0], recipe, *command[1:], "--set", "objective=dpo")
    assert "sweeps and learning curves are not possible with `objective: dpo`" in ended.err


def test_learning_curve_has_four_points(recipe: Path, run: Any, tracking: Tracking) -> None:
    ended = run("train", recipe, "--curve", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert [point["examples"] for point in result["points"]] == [4, 10, 20, 40]
    assert result["sentence"]
    assert Path(result["picture"]).is_file()
    assert len(children(tracking, f"{load_recipe(recipe).name}-curve")) == 4


def test_learning_curve_registers_no_version(recipe: Path, run: Any) -> None:
    assert "--curve registers no version" in run("train", recipe, "--curve", "--quick").err


@pytest.mark.parametrize(
    ("space", "why"),
    [
        ("{train.learning_rates: [1]}", "did you mean 'train.learning_rate'?"),
        ("{train.batch_size: [0]}", "batch_size 0 is not valid in this recipe"),
        ("{adapter.rank: {low: 8, high: 4}}", "in a range, low must be less than high"),
    ],
)
def test_sweep_with_an_invalid_space_is_rejected_before_the_first_trial(
    recipe: Path, run: Any, space: str, why: str
) -> None:
    ended = run("sweep", recipe, "--set", f"sweep.space={space}")
    assert ended.code == 4
    assert why in " ".join(ended.err.split())
    assert "held-out loss of the base" not in ended.err


def test_parallel_option_is_rejected_without_a_ray_cluster(recipe: Path, run: Any) -> None:
    ended = run("sweep", recipe, "--parallel", "2")
    assert ended.code == 2
    assert "--parallel needs --on ray" in ended.err


def test_sweep_on_ray_is_refused_when_no_cluster_address_is_set(recipe: Path, run: Any) -> None:
    ended = run("sweep", recipe, "--on", "ray")
    assert "the address of the Ray cluster is not set" in " ".join(ended.err.split())


# Imports once, then sweeps in a new process for each line of input; prints the process id and the outcome.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from svc.registry.tracking import Tracking
from svc.dataset.prompt_hashes import NO_PROMPTS
from tests.svc.engine.devices import AVX512
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import read_run_examples
from trainer.recipe.file import load_recipe
from trainer.sweep.sweep import run_sweep
from trainer.sweep.trial_runner import TrialRunner
import trainer.training.trial
for line in sys.stdin:
    sweeps = Path(line.strip())
    process = os.fork()
    if process == 0:
        code = 1
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
        try:
            recipe = load_recipe(Path(sys.argv[1]))
            base = Base(Path(recipe.base), recipe.base, "Apache-2.0", "sha256:0")
            tracking = Tracking(sys.argv[2])
            examples, number_type = read_run_examples(recipe), AVX512.training_type
            runner = TrialRunner(sweeps, "sweep", recipe, base, examples, tracking, number_type)
            with runner.held():
                run_sweep(runner)
            code = 0
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            print(repr(error), file=sys.stderr)
        os._exit(code)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


def without_clock(sweeps: Path) -> Any:
    [path] = sweeps.glob("*/result.json")
    result = json.loads(path.read_text("utf-8"))
    return result | {"seconds": 0, "trials": [trial | {"seconds": 0} for trial in result["trials"]]}


def in_the_middle(sweeps: Path, finished: int) -> bool:
    """Return whether the given number of trials has finished and another trial has started."""
    begun, ended = (len(list(sweeps.glob(f"*/trials/*/{name}"))) for name in ("mlflow.json", "outcome.json"))
    return ended >= finished and begun > ended


@pytest.mark.matrix
def test_sweep_resumes_with_the_same_result_after_being_killed_or_interrupted(
    recipe: Path, tracking: Tracking, tmp_path: Path
) -> None:
    tracking.experiments()  # creates the database
    name = load_recipe(recipe).name
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(recipe), tracking.uri],
        cwd=Path(__file__).parents[3],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as sweeper:
        assert sweeper.stdin
        assert sweeper.stdout

        def start(sweeps: Path) -> int:
            assert sweeper.stdin
            assert sweeper.stdout
            print(sweeps, file=sweeper.stdin, flush=True)
            return int(sweeper.stdout.readline())

        start(tmp_path / "whole")
        assert int(sweeper.stdout.readline()) == 0
        alone = len(children(tracking, f"{name}-sweep"))
        for finished, by, status in ((0, signal.SIGKILL, signal.SIGKILL), (2, signal.SIGTERM, 16 << 8)):
            process = start(tmp_path / "cut")
            while not in_the_middle(tmp_path / "cut", finished):
                os.kill(process, 0)
                time.sleep(0.005)
            os.kill(process, by)
            assert int(sweeper.stdout.readline()) == status
        start(tmp_path / "cut")
        assert int(sweeper.stdout.readline()) == 0
        sweeper.stdin.close()
    assert without_clock(tmp_path / "cut") == without_clock(tmp_path / "whole")
    assert len(children(tracking, f"{name}-sweep")) == 2 * alone


def test_keyboard_interrupt_between_training_runs_interrupts_the_sweep(tmp_path: Path) -> None:
    from tests.trainer.conftest import make_recipe
    from trainer.base_model.resolve import Base
    from trainer.pipeline.examples import Examples
    from trainer.sweep.trial_runner import TrialRunner

    examples = Examples((), (), "", "", ())
    base = Base(tmp_path, "./base", None, "sha256:0")
    runner = TrialRunner(tmp_path, "sweep", make_recipe(), base, examples, Tracking(""), AVX512.training_type)
    with pytest.raises(InterruptedRunError), runner.held():
        raise KeyboardInterrupt
