"""Tests that docs/diagnosis.md states the rule for every fault, with the thresholds used in the code."""

import re

from docs.generate import FOLDER
from svc.evaluation.finding import FindingKind
from trainer.callbacks.window import FEW_STEPS, MIN_MEASURED
from trainer.evaluation.diagnosis import curve_rules, heldout_rules, label_rules

PAGE = (FOLDER / "diagnosis.md").read_text("utf-8")


_PARTS = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
SECTIONS = {kind: " ".join(text.split()) for kind, text in zip(_PARTS[1::2], _PARTS[2::2], strict=True)}


def test_every_finding_is_documented_with_a_recipe_change() -> None:
    assert [kind for kind in FindingKind if "**Change** `" not in SECTIONS.get(kind, "")] == []


def test_documented_finding_thresholds_match_the_code() -> None:
    phrases = {
        FindingKind.DIVERGENCE: [f"{curve_rules.SURE:g} standard errors and {curve_rules.ABOVE_START:.0%}"],
        FindingKind.UNDERFITTING: [
            f"{curve_rules.UNFINISHED_SHARE:.0%} of the total fall",
            f"more than {curve_rules.HELDOUT_SHARE:.0%} of the fall of held-out loss",
            f"more than {curve_rules.LATE_SURE:g} standard errors over the same held-out examples",
            f"explain at most {label_rules.HARDLY_GAINED:.0%} of the entropy of the held-out labels, and the run had "
            f"fewer than {FEW_STEPS} steps",
            f"more than {label_rules.STILL_FALLING:.0%} of its level at the end, and by {label_rules.LATE_SURE:g} "
            "standard errors",
            f"explain at most {label_rules.PARTLY_GAINED:.0%}, the run had fewer than {FEW_STEPS} steps",
            f"more than {label_rules.HELDOUT_FALLING:.0%} of its level at the end, and by {label_rules.HELDOUT_SURE:g} "
            "standard errors over the same held-out examples",
        ],
        FindingKind.OVERFITTING: [
            f"by more than {heldout_rules.RISE:.0%}",
            f"at {heldout_rules.FALSE_ALARMS:.0%}",
            f"{MIN_MEASURED} measured examples",
        ],
        FindingKind.TOO_LITTLE_DATA: [
            f"Fewer than {heldout_rules.FEW_EXAMPLES} training examples",
            f"fewer than {heldout_rules.MANY_EXAMPLES:,}",
            f"{heldout_rules.GAP_OF_MANY_EPOCHS:g} times it from {heldout_rules.MANY_EPOCHS} epochs",
        ],
        FindingKind.LABEL_NOISE: [
            f"at most {label_rules.STILL_LEARNING:.0%} of its level at the end",
            f"{label_rules.MIN_ASKED} or more held-out answers",
            f"of {label_rules.LEARNT:g} or more",
            f"More than {label_rules.WRONG:.0%} of the most confident third",
            f"below {label_rules.SURE:g}",
            f"more than {label_rules.CONTRADICTED:.0%} of the training examples",
        ],
        FindingKind.HELDOUT_TOO_SMALL: [f"wider than {heldout_rules.WIDEST:g}"],
        FindingKind.ANSWERS_CUT_OFF: [f"More than {heldout_rules.CUT_OFF:.0%} of the held-out answers"],
    }
    expected = [(kind, phrase) for kind, those in phrases.items() for phrase in those]
    assert [f"{kind}: {phrase}" for kind, phrase in expected if phrase not in SECTIONS[kind]] == []
