"""Tests int8, fp8 and AWQ on the real engine, from writing the files to replacing one version by another."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.service import serving, svc_json
from svc.version import Format
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY

pytestmark = [pytest.mark.matrix]

PORT = 8745
GROUPS = ((Format.INT8, Format.FP8), (Format.AWQ,))
"""Formats of a version in addition to merged. The server prefers the first one."""


@pytest.fixture(scope="module", params=GROUPS, ids=lambda formats: "-".join(formats))
def formats(request: pytest.FixtureRequest) -> tuple[Format, ...]:
    formats: tuple[Format, ...] = request.param
    return formats


@pytest.fixture(scope="module")
def formats_home(workplace: Path, formats: tuple[Format, ...]) -> Path:
    return workplace / f"{formats[0]}-home"


@pytest.fixture(scope="module")
def versions(workplace: Path, formats_home: Path, formats: tuple[Format, ...]) -> list[Any]:
    """Return the manifests of two versions, the first in all formats and merged, the second in the first format."""
    made = []
    for seed, listed in ((0, (Format.MERGED, *formats)), (1, formats[:1])):
        listed_formats = json.dumps(listed)
        sets = (f"formats={listed_formats}", f"train.seed={seed}", "qualify.restart=false", "evaluate.general=false")
        options = [part for value in sets for part in ("--set", value)]
        trained: Any = svc_json(formats_home, "train", str(workplace / "recipe.yaml"), *options)
        made.append(svc_json(formats_home, "show", trained["version"]))
    return made


@pytest.fixture(scope="module")
def client(versions: list[Any], formats_home: Path) -> Iterator[openai.OpenAI]:
    with (
        serving(formats_home, "tiny@1", PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_quantized_format_passes_all_checks_and_its_nll_is_close_to_that_of_the_merged_weights(
    versions: list[Any], formats: tuple[Format, ...], report: Report
) -> None:
    made, base = versions[0]["formats"], versions[0]["base_evaluation"]["nll"]["value"]
    for format in formats:
        merged, rounded = (made[name]["evaluation"]["nll"]["value"] for name in (Format.MERGED, format))
        assert len(made[format]["probes"]) == 8
        assert abs(rounded - merged) < (base - merged) / 10
        assert any(check["name"] == f"{format}: weight rounding" for check in versions[0]["parity"]["checks"])
        report(f"{format}: NLL base {base:.3f}, merged {merged:.3f}, {format} {rounded:.3f}")


def test_versions_of_the_same_format_are_swapped_in_place(
    versions: list[Any], formats_home: Path, formats: tuple[Format, ...], client: openai.OpenAI
) -> None:
    """The server chooses the quantized format before merged weights, and compares the probes after the reload."""
    messages: Any = PROMPTS[0]
    for version in (None, "tiny@2", "tiny@1"):
        if version:
            swap: Any = svc_json(formats_home, "promote", version, *ANY_QUALITY)
            assert swap["kind"] == "inplace"
            assert swap["outcome"] == "succeeded"
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, max_tokens=5)
        assert raw.headers["x-model-version"] == (version or "tiny@1")
    (model,) = svc_json(formats_home, "status")["models"]
    assert model["format"] == formats[0]
