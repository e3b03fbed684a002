"""Tests the finals of a sweep: finalists answer on one engine, and the winner is chosen by their answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.evaluation.general.general_set import GeneralSet
from svc.model_folder.chat_template import TemplateKwargs
from svc.registry.tracking import Tracking
from svc.settings.engine import Device, EngineSettings
from svc.settings.settings import Settings
from tests.serving.engine_double import tokenized
from tests.svc.engine.devices import AVX512
from tests.svc.registry.model_folder import write_model
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from tests.trainer.sweep.fake_trials import TOKENS, outcome
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.sweep import finals as module
from trainer.sweep.finals import Finalist, Finals
from trainer.sweep.outcome import TrialComparison, TrialOutcome
from trainer.sweep.search import RATE
from trainer.sweep.trial_runner import TrialRunner

pytestmark = pytest.mark.slow

UNCHANGED = outcome(0.5, "unchanged")
FAST, MIDDLE, SLOW = (
    outcome(loss, key, {RATE: rate})
    for loss, key, rate in ((0.1, "fast", 2e-3), (0.2, "middle", 1e-3), (0.4, "slow", 1e-4))
)
TRIALS = [UNCHANGED, FAST, SLOW, MIDDLE]


class Contest:
    """Finals on engine doubles, which answer with the key of the trial whose merged weights they hold.

    Attributes:
        logged: metrics logged to MLflow, by trial.
        dequantized: for each merge, whether it was into weights rounded to NF4.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines = Engines()
        self.logged: dict[str, dict[str, float]] = {}
        self.dequantized: list[bool] = []
        self._folder, self._base = folder, write_model(folder / "base")
        monkeypatch.setattr(module, "tokenize_as_trained", _tokenize)
        monkeypatch.setattr(module, "merge_adapter", self._merge)
        monkeypatch.setattr(
            TrialRunner, "log_final", lambda runner, trial, figures: self.logged.update({trial.key: figures})
        )

    def open(self, right: Sequence[str] = (), knowing: Sequence[str] = ("base",), **sections: Any) -> Finals:
        """Return the finals of a sweep.

        Args:
            right: trials that answer the held-out examples correctly.
            knowing: models that answer the general questions correctly.
        """
        heldout = tuple(make_example(f"ask {number}", " ".join(right) or "none") for number in range(10))
        asked = tuple(make_example(f"general {number}", "-") for number in range(10))
        questions = GeneralSet("own.jsonl", asked, (tuple(f"{name}.0" for name in knowing) or ("-",),) * 10)
        examples = Examples((), heldout, "", "", (), questions=questions)
        base = Base(self._base, "./base", None, "sha256:0")
        recipe = make_recipe(**({"evaluate": {"metrics": "exact_match"}} | sections))
        runner = TrialRunner(
            self._folder / "sweeps", "sweep", recipe, base, examples, Tracking(""), AVX512.training_type
        )
        for trial in TRIALS:
            runner.adapter(trial).mkdir(parents=True, exist_ok=True)
        settings = Settings(home=self._folder / "home", engine=EngineSettings(device=Device.CPU))
        return Finals(runner, settings, AVX512, self._launch)

    def _merge(self, base: Path, adapter: Path, out: Path, *, dequantized: bool) -> None:
        write_model(out, seed=1)
        self.dequantized.append(dequantized)

    def _launch(self, folder: Path, *, template_kwargs: TemplateKwargs) -> Any:
        return self.engines(folder)


def _tokenize(folder: Path, examples: Sequence[ChatExample], kwargs: TemplateKwargs) -> list[TokenizedExample]:
    return list(map(tokenized, examples))


def answer(key: str) -> list[str]:
    """Return the words in the answers of a double that holds this trial."""
    return [f"{key}.{place}" for place in range(4)]


def won(finals: Finals, preferred: TrialOutcome = FAST) -> tuple[str, list[str], list[Finalist]]:
    """Return the winner's key, the reasons for the choice, and all finalists."""
    finalists = finals.measure(finals.rank(TRIALS))
    winner = finals.choose(finalists, preferred, TrialComparison(TOKENS))
    return winner.trial.key, finals.reasons(winner, finalists, preferred), finalists


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contest:
    return Contest(tmp_path, monkeypatch)


def test_trial_with_the_lowest_loss_wins_when_finalists_do_not_differ_in_their_answers(contest: Contest) -> None:
    key, reasons, finalists = won(contest.open())
    assert (key, reasons) == ("fast", [])
    assert [finalist.trial.key for finalist in finalists] == ["unchanged", "fast", "middle", "slow"]


def test_finalist_that_is_significantly_better_on_the_primary_metric_wins_despite_a_higher_loss(
    contest: Contest,
) -> None:
    key, reasons, _ = won(contest.open(right=answer("slow")))
    assert key == "slow"
    assert reasons == ["learning_rate 0.002 would win by held-out loss, but its exact match is worse"]


@pytest.mark.parametrize("dequantized", [False, True])
def test_finalists_are_merged_into_dequantized_base_weights_only_if_the_recipe_says_so(
    contest: Contest, dequantized: bool
) -> None:
    won(contest.open(method="qlora", merge_dequantized=dequantized))
    assert set(contest.dequantized) == {dequantized}


def test_sweep_without_a_forgetting_limit_only_reports_forgetting(contest: Contest) -> None:
    key, _, finalists = won(contest.open(knowing=["base", "slow"]))
    assert key == "fast"
    lost = {one.trial.key: one.forgetting.lost for one in finalists if one.forgetting}
    assert lost == {"unchanged": 10, "fast": 10, "middle": 10, "slow": 0}
    assert contest.logged["fast"]["general_difference_merged"] == -1


def test_trial_exceeding_the_forgetting_limit_does_not_win(contest: Contest) -> None:
    limits = {"metrics": "exact_match", "max_forgetting": 0.1}
    finals = contest.open(answer("fast"), ["base", "middle", "slow"], evaluate=limits)
    key, reasons, finalists = won(finals)
    assert key == "middle"
    assert reasons == [
        "learning_rate 0.002 would win by held-out loss, but it forgets more than evaluate.max_forgetting allows"
    ]
    winner = next(finalist for finalist in finalists if finalist.trial.key == key)
    lines = {line.values.get(RATE): line for line in finals.result(winner, finalists).lines}
    assert [lines[rate].allowed for rate in (None, 2e-3, 1e-3)] == [False, False, True]
    assert (lines[2e-3].primary.value, lines[2e-3].difference.value) == (1, 1)


def test_more_trials_are_evaluated_until_one_stays_within_the_forgetting_limit(contest: Contest) -> None:
    limits = {"metrics": "exact_match", "max_forgetting": 0.1}
    finals = contest.open(knowing=["base", "slow"], evaluate=limits, sweep={"finalists": 1})
    key, _, finalists = won(finals)
    assert key == "slow"
    assert len(finalists) == 4


def test_trial_with_the_least_forgetting_wins_when_all_trials_exceed_the_forgetting_limit(contest: Contest) -> None:
    limits = {"metrics": "exact_match", "max_forgetting": 0.1}
    key, reasons, _ = won(contest.open(evaluate=limits))
    assert key == "unchanged"
    assert "all measured trials forget more" in reasons[0]


def test_number_of_finalists_is_limited_by_the_recipe(contest: Contest) -> None:
    finalists = won(contest.open(sweep={"finalists": 1}))[2]
    assert [finalist.trial.key for finalist in finalists] == ["unchanged", "fast"]


def test_finalists_are_evaluated_only_once_and_in_one_engine(contest: Contest) -> None:
    first = won(contest.open())
    assert contest.engines.started_with == ["base"]
    assert contest.engines.running == 0
    assert won(contest.open()) == first
    assert len(contest.engines.launched) == 1


def test_no_merged_weights_are_left_after_the_finals_of_a_sweep(contest: Contest) -> None:
    finals = contest.open()
    won(finals)
    assert not list(finals.runner.folder.glob("finals/*"))


def test_trials_whose_adapter_is_missing_are_excluded_from_the_finals(contest: Contest) -> None:
    finals = contest.open()
    finals.runner.adapter(MIDDLE).rmdir()
    assert [trial.key for trial in finals.rank(TRIALS)] == ["unchanged", "fast", "slow"]


@pytest.mark.parametrize(
    ("sections", "has"),
    [
        ({}, True),
        ({"method": "dora"}, True),
        ({"method": "full"}, False),
        ({"formats": ["adapter"]}, False),
        ({"sweep": {"finalists": 0}}, False),
    ],
)
def test_sweep_has_finals_only_if_it_trains_adapters_and_the_recipe_includes_a_merged_format(
    contest: Contest, sections: dict[str, Any], has: bool
) -> None:
    assert contest.open(**sections).runner.has_finals is has
