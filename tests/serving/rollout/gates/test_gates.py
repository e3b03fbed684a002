"""The gates of a promotion: integrity, quality, forgetting, speed and freshness, from stored results alone."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from serving.rollout.gates.gates import check_gates, refused, refusing_gates
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.intervals import proportion
from svc.evaluation.metrics.labels import MacroF1
from svc.registry.manifest import BaseRecord, DataRecord
from svc.registry.objects import ObjectStore
from svc.registry.registry import Registry
from svc.settings.gates import GateSettings
from svc.store.gate_rows import GateRow, GateVerdict
from svc.version import Format, VersionId
from tests.serving.rollout.gates.registered import edit, new_registry, promotion, register, row
from tests.serving.versions import NAME, OTHER_FACTS, AliasBook, make_version
from tests.svc.registry.manifests import gate_report, report
from tests.svc.registry.parity import SPEED, make_parity

NOW = datetime(2026, 1, 11, tzinfo=UTC)  # ten days after the registration of all versions
PASSED, FAILED, UNDECIDED, SKIPPED = GateVerdict


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return new_registry(tmp_path)


def check(registry: Registry, gate: str, *, format: Format = Format.MERGED, **settings: Any) -> GateRow:
    """Return the row of one gate on the promotion of version 2 over version 1."""
    return row(check_gates(promotion(registry, format=format), GateSettings(**settings), NOW), gate)


def test_no_gate_fails_for_a_version_equal_to_production(registry: Registry) -> None:
    register(registry, 1), register(registry, 2)
    rows = check_gates(promotion(registry), GateSettings(quality_margin=0.05), NOW)
    assert {each.gate: each.verdict for each in rows} == {
        "checks": PASSED,
        "files": PASSED,
        "parity": PASSED,
        "probes": PASSED,
        "licence": PASSED,
        "quality": PASSED,
        "nll": PASSED,
        "forgetting": SKIPPED,
        "speed": SKIPPED,
        "first_token": SKIPPED,
        "freshness": SKIPPED,
    }
    assert refusing_gates(rows, GateSettings()) == ()


def test_version_with_failed_registration_checks_is_refused_and_the_checks_are_listed(registry: Registry) -> None:
    register(registry, 1), register(registry, 2, failed=("GPTQ lost 0.3", "the tokens differ"))
    failed = check(registry, "checks")
    assert (failed.verdict, failed.reason) == (FAILED, "GPTQ lost 0.3; the tokens differ")
    error = refused(VersionId(NAME, 2), [failed])
    assert error.exit_code == 23
    assert "GPTQ lost 0.3" in error.wrong and "svc promote tuned@2 --force --reason TEXT" in error.todo


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_files_gate_detects_a_missing_or_truncated_file(registry: Registry, damage: str) -> None:
    register(registry, 1), register(registry, 2)
    weights = registry.folder(VersionId(NAME, 2)) / "merged" / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    files = check(registry, "files")
    assert files.verdict is FAILED and "merged/model.safetensors" in files.reason


def test_parity_gate_fails_if_a_check_in_the_parity_report_failed(registry: Registry) -> None:
    register(registry, 1), register(registry, 2, parity=make_parity("template"))
    parity = check(registry, "parity")
    assert (parity.verdict, parity.measured) == (FAILED, "1 of 2 checks passed")
    assert "template" in parity.reason


def test_parity_and_license_gates_are_undecided_if_the_information_they_check_is_missing(registry: Registry) -> None:
    register(registry, 1)
    register(registry, 2, parity=None, base=BaseRecord(origin="base", revision="1", licence=None))
    assert check(registry, "parity").verdict is check(registry, "licence").verdict is UNDECIDED


@pytest.mark.slow
def test_probes_gate_passes_an_adapter_if_the_merged_model_has_probes_and_is_undecided_without_probes(
    registry: Registry,
) -> None:
    formats = (Format.MERGED, Format.ADAPTER)
    register(registry, 1, formats=formats), register(registry, 2, formats=formats)
    assert check(registry, "probes", format=Format.ADAPTER).verdict is PASSED
    make_version(registry, 3, probes=False)
    rows = check_gates(promotion(registry, 3), GateSettings(), NOW)
    assert row(rows, "probes").verdict is UNDECIDED


def test_version_with_better_quality_passes_the_quality_gate(registry: Registry) -> None:
    register(registry, 1, 60), register(registry, 2, 80)
    quality = check(registry, "quality")
    assert quality.verdict is PASSED
    assert quality.measured.startswith("exact match: 0.600 tuned@1, 0.800 tuned@2; loss -0.200 [-0.2")
    assert quality.limit == "loss of at most 0.020"


def test_promotion_is_refused_if_a_quality_loss_is_proven(registry: Registry) -> None:
    register(registry, 1, 80), register(registry, 2, 60)
    rows = check_gates(promotion(registry), GateSettings(), NOW)
    assert [each.gate for each in refusing_gates(rows, GateSettings())] == ["quality"]
    assert row(rows, "quality").reason.startswith("a loss of 0.1")


def test_quality_gate_with_too_few_examples_is_undecided_and_names_the_number_needed(registry: Registry) -> None:
    register(registry, 1, 80), register(registry, 2, 79)
    quality = check(registry, "quality")
    assert quality.verdict is UNDECIDED
    assert "cannot be excluded with 100 examples; about 2,300 would decide" in quality.reason


def test_undecided_gate_blocks_a_promotion_only_if_configured(registry: Registry) -> None:
    register(registry, 1, 80), register(registry, 2, 79)
    strict = GateSettings.model_validate({"undecided": "refuse"})
    rows = check_gates(promotion(registry), strict, NOW)
    assert "quality" in [each.gate for each in refusing_gates(rows, strict)]
    assert refusing_gates(rows, GateSettings()) == ()


def test_quality_gate_without_a_margin_is_skipped_but_shows_the_loss(registry: Registry) -> None:
    register(registry, 1, 80), register(registry, 2, 10)
    quality = check(registry, "quality", quality_margin=None)
    assert (quality.verdict, quality.reason) == (SKIPPED, "no margin is set")
    assert "loss 0.700" in quality.measured


@pytest.mark.slow
def test_version_that_makes_references_less_likely_fails_the_nll_gate(registry: Registry) -> None:
    register(registry, 1, nll=1.0), register(registry, 2, nll=1.2)
    nll = check(registry, "nll")
    assert nll.verdict is FAILED
    assert nll.measured.startswith("nats per token: 1.020 tuned@1, 1.220 tuned@2; loss 0.200")
    assert check(registry, "nll", nll_margin=0.3).verdict is PASSED


def test_nll_gate_is_undecided_if_the_references_are_tokenized_differently(registry: Registry) -> None:
    register(registry, 1), register(registry, 2, scored=4)
    nll = check(registry, "nll")
    assert (nll.verdict, nll.reason) == (UNDECIDED, "the tokenizers or chat templates differ")


def test_versions_are_compared_only_on_examples_in_both_evaluations(registry: Registry) -> None:
    register(registry, 1, 40, 100), register(registry, 2, 40, 40)
    assert check(registry, "quality").measured.startswith("exact match: 1.000 tuned@1, 1.000 tuned@2")


def test_quality_gate_names_the_compare_command_if_held_out_examples_differ(registry: Registry) -> None:
    data = DataRecord(train_fingerprint="a", train_examples=1, heldout_fingerprint="c", heldout_examples=1)
    register(registry, 1), register(registry, 2, data=data)
    quality, nll = check(registry, "quality"), check(registry, "nll")
    heldout = registry.folder(VersionId(NAME, 1)) / "heldout.jsonl"
    assert quality.verdict is nll.verdict is UNDECIDED
    assert f"svc compare tuned@1 tuned@2 --data {heldout}" in quality.reason


def test_quality_gate_is_undecided_if_the_versions_have_different_primary_metrics(registry: Registry) -> None:
    register(registry, 1)
    register(registry, 2, evaluation=report().model_copy(update={"primary": "accuracy"}))
    quality = check(registry, "quality")
    assert quality.verdict is UNDECIDED
    assert "exact_match and accuracy" in quality.reason


def test_quality_gate_recomputes_a_corpus_metric_from_the_answers(registry: Registry) -> None:
    metric = MacroF1()
    scored = report().model_copy(
        update={"primary": metric.name, "metrics": {metric.name: report().metrics["exact_match"]}}
    )
    for number in (1, 2):
        register(registry, number, 3, 3, evaluation=scored)
    assert check(registry, "quality").measured.startswith("macro-F1: 0.000 tuned@1, 0.000 tuned@2")


def test_metric_function_of_a_version_is_never_run_by_a_gate(registry: Registry, tmp_path: Path) -> None:
    code = tmp_path / "metric.py"
    code.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef score(*_): return [1.0]\n")
    scored = report().model_copy(update={"primary": f"{code}:score"})
    for number in (1, 2):
        register(registry, number, evaluation=scored)
    quality = check(registry, "quality")
    assert (quality.verdict, (tmp_path / "ran").exists()) == (UNDECIDED, False)


def test_quality_gate_fails_if_the_results_were_altered_and_is_undecided_if_there_are_none(registry: Registry) -> None:
    register(registry, 1), register(registry, 2)
    results = registry.folder(VersionId(NAME, 2)) / "reference" / "merged.jsonl"
    results.write_bytes(results.read_bytes().replace(b"0.0", b"1.0"))
    altered = check(registry, "quality")
    assert altered.verdict is FAILED and "was changed after registration" in altered.reason
    make_version(registry, 3)
    rows = check_gates(promotion(registry, 3), GateSettings(), NOW)
    assert row(rows, "quality").verdict is row(rows, "nll").verdict is UNDECIDED


@pytest.mark.parametrize("damage", ["results", "manifest", "removed"])
def test_damaged_version_in_production_can_be_replaced(registry: Registry, damage: str) -> None:
    register(registry, 1), register(registry, 2)
    folder = registry.folder(VersionId(NAME, 1))
    if damage == "results":
        (folder / "reference" / "merged.jsonl").write_text("broken")
    elif damage == "manifest":
        (folder / "manifest.json").write_text("broken")
    else:
        shutil.rmtree(folder)
    rows = check_gates(promotion(registry), GateSettings(), NOW)
    assert row(rows, "quality").verdict is row(rows, "nll").verdict is UNDECIDED
    assert refusing_gates(rows, GateSettings()) == ()


def test_version_in_production_is_compared_with_its_base(registry: Registry) -> None:
    register(registry, 1, 80, base_right=20)
    rows = check_gates(promotion(registry, 1), GateSettings(), NOW)
    quality = row(rows, "quality")
    assert quality.verdict is PASSED
    assert quality.measured.startswith("exact match: 0.200 base, 0.800 tuned@1")


@pytest.mark.slow
def test_quality_gate_for_an_adapter_uses_the_results_of_the_merged_model(registry: Registry) -> None:
    formats = (Format.MERGED, Format.ADAPTER)
    register(registry, 1, 60, formats=formats), register(registry, 2, 80, formats=formats)
    assert check(registry, "quality", format=Format.ADAPTER).verdict is PASSED
    speed = check(registry, "speed", format=Format.ADAPTER)
    assert (speed.verdict, speed.reason) == (SKIPPED, "not measured for adapters")


def test_gate_that_was_undecided_at_registration_is_also_undecided_at_promotion(registry: Registry) -> None:
    register(registry, 1), register(registry, 2, gates=(gate_report(0.09),))
    gptq = check(registry, "gptq_quality")
    assert gptq.verdict is UNDECIDED
    assert "evaluate.max_gptq_loss" in gptq.limit
    assert "about 500 would decide" in gptq.reason


def forgetting(lost: int) -> dict[str, Any]:
    nothing = proportion(30, 60)
    values = ("before", "after", "difference", "nll_before", "nll_after", "nll_difference")
    figures = dict.fromkeys(values, nothing)
    record = Forgetting(questions="general", fingerprint="f", examples=60, lost=lost, gained=0, **figures)
    return {"forgetting": {Format.MERGED: record}}


@pytest.mark.parametrize(("lost", "verdict"), [(0, PASSED), (12, UNDECIDED), (30, FAILED)])
def test_forgetting_gate_compares_the_share_of_lost_answers_with_the_configured_margin(
    registry: Registry, lost: int, verdict: GateVerdict
) -> None:
    register(registry, 1), register(registry, 2, **forgetting(lost))
    assert check(registry, "forgetting", forgetting_margin=0.15).verdict is verdict
    assert check(registry, "forgetting").verdict is SKIPPED


def test_forgetting_gate_is_undecided_without_general_questions(registry: Registry) -> None:
    register(registry, 1), register(registry, 2)
    assert check(registry, "forgetting", forgetting_margin=0.1).verdict is UNDECIDED


def speed(factor: float, others_share: float = 0.0) -> dict[str, Any]:
    """Return a parity report with precise speeds; a larger factor is slower."""
    first = SPEED.first_token_seconds.model_copy(update={"value": factor, "low": factor * 0.99, "high": factor * 1.01})
    rate = {"value": 100 / factor, "low": 99 / factor, "high": 101 / factor}
    measured = SPEED.model_copy(
        update={
            "first_token_seconds": first,
            "tokens_per_second": {8: SPEED.first_token_seconds.model_copy(update=rate)},
            "others_share": others_share,
        }
    )
    return {"parity": make_parity().model_copy(update={"speed": {Format.MERGED: measured}})}


def register_two(registry: Registry, factor: float, others_share: float = 0.0, *, same: bool = False) -> VersionId:
    """Register two versions with measured speeds, and return the second.

    Args:
        factor: how much slower the second version is.
        same: whether they differ only in their weights.
    """
    for number, slower, busy in ((1, 1.0, 0.0), (2, factor, others_share)):
        version = register(registry, number, **speed(slower, busy))
        record = registry.manifest(version).formats[Format.MERGED]
        fingerprint = "sha256:ab" if same else f"sha256:{number}"
        edit(registry, version, formats={Format.MERGED: record.model_copy(update={"fingerprint": fingerprint})})
    return version


@pytest.mark.parametrize(("factor", "verdict"), [(0.5, PASSED), (1.1, PASSED), (1.2, UNDECIDED), (1.5, FAILED)])
def test_speed_gates_compare_the_slowdown_with_their_margin(
    registry: Registry, factor: float, verdict: GateVerdict
) -> None:
    register_two(registry, factor)
    assert check(registry, "speed").verdict is check(registry, "first_token").verdict is verdict


@pytest.mark.slow
def test_speed_gate_is_skipped_when_versions_differ_only_in_weights(registry: Registry) -> None:
    register_two(registry, 1.5, same=True)
    assert check(registry, "speed").verdict is check(registry, "first_token").verdict is SKIPPED


def test_speed_gate_is_undecided_when_the_machine_was_busy(registry: Registry) -> None:
    register_two(registry, 2.0, others_share=0.4)
    assert "other processes used 40%" in check(registry, "speed").reason


@pytest.mark.slow
def test_speed_gate_is_undecided_when_the_engine_kinds_differ(registry: Registry) -> None:
    version = register_two(registry, 2.0)
    record = registry.manifest(version).formats[Format.MERGED]
    probes = tuple(probe.model_copy(update={"engine": OTHER_FACTS}) for probe in record.probes)
    edit(registry, version, formats={Format.MERGED: record.model_copy(update={"probes": probes})})
    assert check(registry, "speed").reason == "measured on different kinds of engine"


def data_of_age(days: float | None) -> dict[str, Any]:
    """Return the manifest's data section for training files that were modified this many days ago."""
    modified_at = None if days is None else NOW - timedelta(days=days)
    data = DataRecord(train_fingerprint="a", train_examples=1, heldout_fingerprint="b", heldout_examples=1)
    return {"data": data.model_copy(update={"modified_at": modified_at})}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "data", "verdict"),
    [(None, 12, SKIPPED), (9, 5, FAILED), (11, 5, PASSED), (11, 12, FAILED), (13, 12, PASSED), (1, -1, FAILED)],
)
def test_freshness_gate_fails_if_the_data_or_the_evaluation_is_older_than_the_maximum_age(
    registry: Registry, limit: float | None, data: float, verdict: GateVerdict
) -> None:
    register(registry, 1), register(registry, 2, **data_of_age(data))
    freshness = check(registry, "freshness", max_age_days=limit)
    assert freshness.verdict is verdict
    assert freshness.measured == f"data {max(data, 0):.1f} days, evaluation 10.0 days"


@pytest.mark.parametrize(("limit", "verdict"), [(None, SKIPPED), (9, FAILED), (11, UNDECIDED)])
def test_freshness_gate_is_undecided_when_the_age_of_the_data_is_unknown(
    registry: Registry, limit: float | None, verdict: GateVerdict
) -> None:
    register(registry, 1), register(registry, 2, **data_of_age(None))
    freshness = check(registry, "freshness", max_age_days=limit)
    assert freshness.verdict is verdict
    assert freshness.measured == "data of unknown age, evaluation 10.0 days"


@pytest.mark.slow
def test_version_in_the_object_store_is_downloaded_before_its_files_are_checked(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    objects = ObjectStore((tmp_path / "shared").as_uri())
    trains, serves = (Registry(tmp_path / home / "models", AliasBook(), objects) for home in ("trains", "serves"))
    for number in (1, 2):
        trains.push(register(trains, number))
    assert row(check_gates(promotion(serves), GateSettings(), NOW), "files").verdict is PASSED
