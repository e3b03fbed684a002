"""Tests the data that a report collects about a version."""

import pytest

from svc.errors import IntegrityError, NotFoundError
from svc.version import VersionId
from tests.builders.judged_versions import LABELS, RUN, JudgedVersions, curve, right
from trainer.data.summary import summarize_data
from trainer.report.judged import BASE
from trainer.report.report import gather_report

ANSWERS = {BASE: right(LABELS, 10), "merged": right(LABELS, 50), "gptq": right(LABELS, 45)}


@pytest.mark.slow
def test_report_contains_all_data_of_the_version(versions: JudgedVersions) -> None:
    made = versions.publish(LABELS, ANSWERS)
    report = gather_report(versions.registry, made.id)
    assert report.manifest == made
    assert (tuple(report.judged.evaluations), report.judged.tuned) == ((BASE, "merged", "gptq"), "merged")
    assert report.judged.rows[0].name == "accuracy"
    assert report.curve == tuple(curve())
    assert report.data == summarize_data(LABELS, LABELS)
    assert report.heldout_labels == {"net": 20, "games": 20, "java": 20}
    assert report.run == RUN
    assert report.confusion is not None
    assert sum(map(sum, report.confusion.counts)) == len(LABELS)
    assert len(report.judged.worst) == 10
    assert len(report.judged.side_by_side) == 20


@pytest.mark.slow
def test_report_uses_only_evaluated_examples_when_evaluation_is_limited(versions: JudgedVersions) -> None:
    manifest = versions.publish(LABELS, {"merged": right(LABELS, 50)}, judged=21)
    report = gather_report(versions.registry, manifest.id)
    assert report.judged.side_by_side[-1] == 20
    assert report.heldout_labels == {"net": 20, "games": 20, "java": 20}


@pytest.mark.slow
def test_version_with_only_an_adapter_has_no_evaluation_in_the_report(versions: JudgedVersions) -> None:
    report = gather_report(versions.registry, versions.publish(LABELS, {}).id)
    assert (report.judged.tuned, report.judged.rows, report.judged.verdicts, report.confusion) == (None, (), (), None)


def test_report_of_a_nonexistent_version_raises_not_found(versions: JudgedVersions) -> None:
    with pytest.raises(NotFoundError, match="there is no version"):
        gather_report(versions.registry, VersionId(versions.name, 7))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["base.jsonl", "training.jsonl", "data_summary.json", "run.json"])
def test_file_modified_after_registration_is_rejected(versions: JudgedVersions, file: str) -> None:
    manifest = versions.publish(LABELS, ANSWERS)
    path = versions.registry.folder(manifest.id) / "reference" / file
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(IntegrityError, match="was changed after registration"):
        gather_report(versions.registry, manifest.id)
