"""Tests versions that do not fit the running engine because of a different architecture or chat template.

They need a second training, so `make test-matrix` runs them. A different format is tested in
test_hot_load.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.load import Load
from examples.service import svc_json
from examples.tamper import replace_template
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, figures
from tests.hub_models.build import build_hub_model

pytestmark = [pytest.mark.matrix]

PORT = 8947
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def instance(home: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with version 1. Version 3 is a Qwen2; version 4 is version 1 with a different template."""
    folder = tmp_path_factory.mktemp("other-models")
    instance = Instance(home, folder / "home", PORT, PROMPTS)
    build_hub_model(folder / "base", "qwen2_5")
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).symlink_to(workplace / name)
    (folder / "recipe.yaml").write_text((workplace / "recipe.yaml").read_text("utf-8"), "utf-8")
    recipe = str(folder / "recipe.yaml")
    trained = svc_json(instance.home, "train", recipe, "--set", "qualify.restart=false")
    assert trained["version"] == "tiny@3"
    versions = instance.home / "models" / "tiny"
    replace_template(versions / "1", versions / "4", TEMPLATE)
    try:
        instance.start("tiny@1")
        yield instance
    finally:
        instance.close()


@pytest.mark.parametrize("number", [3, 4], ids=["architecture", "template"])
def test_swap_to_or_from_an_incompatible_version_uses_a_second_engine(
    instance: Instance, report: Report, number: int
) -> None:
    before = instance.answers()
    with Load(instance.url, "tiny", instance.prompts, streams=1) as load:
        load.wait_for(2)
        there = instance.promote(f"tiny@{number}")
        after = instance.answers()
        back = svc_json(instance.home, "rollback", "tiny")
        load.wait_for(2)
    report(f"to tiny@{number}: {figures(load, there)}")
    assert [swap["kind"] for swap in (there, back)] == ["bluegreen", "bluegreen"]
    assert (there["queued"], back["queued"], load.failed) == (None, None, [])
    assert {version for version, _ in after} == {f"tiny@{number}"}
    assert after != [(f"tiny@{number}", text) for _, text in before]
    assert instance.answers() == before
    instance.until(lambda status: len(status["engines"]) == 1)
