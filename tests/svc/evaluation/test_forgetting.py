"""Tests forgetting: how many right answers to the same questions were lost through training."""

from svc.evaluation.forgetting import measure_forgetting, tracked
from svc.evaluation.general.general_set import GeneralSet
from svc.version import Format
from tests.svc.evaluation.answered import answered

QUESTIONS = 20


def test_forgetting_report_compares_both_models_and_counts_lost_and_gained_answers() -> None:
    before = answered([("so: right", "right")] * 10 + [("no", "right")] * 10, [1.0] * QUESTIONS)
    after = answered([("right", "right")] * 4 + [("no", "right")] * 15 + [("right", "right")], [1.5] * QUESTIONS)
    questions = GeneralSet("own.jsonl", tuple(before.examples), (("right",),) * QUESTIONS)
    found = measure_forgetting(questions, before.results, after.results)
    assert (found.questions, found.fingerprint, found.examples) == ("own.jsonl", questions.fingerprint, QUESTIONS)
    assert (found.before.value, found.after.value, found.lost, found.gained) == (0.5, 0.25, 6, 1)
    assert found.difference.low <= found.difference.value == -0.25 <= found.difference.high
    assert (found.nll_before.value, found.nll_after.value, found.nll_difference.low) == (1.0, 1.5, 0.5)
    assert tracked(found, Format.GPTQ) == {
        "general_base": 0.5,
        "general_gptq": 0.25,
        "general_difference_gptq": -0.25,
        "general_nll_base": 1.0,
        "general_nll_gptq": 1.5,
    }
