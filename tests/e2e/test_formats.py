"""Tests the 8-bit formats on the real engine: written, evaluated, compared, registered, served and swapped."""

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
EIGHT_BITS = (Format.INT8, Format.FP8)


@pytest.fixture(scope="module")
def formats_home(workplace: Path) -> Path:
    return workplace / "formats-home"


@pytest.fixture(scope="module")
def versions(workplace: Path, formats_home: Path) -> list[Any]:
    """Return the manifests of two versions, the first in all 8-bit formats, the second in INT8."""
    made = []
    for seed, formats in ((0, '["merged", "int8", "fp8"]'), (1, '["int8"]')):
        sets = (f"formats={formats}", f"train.seed={seed}", "qualify.restart=false", "evaluate.general=false")
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


@pytest.mark.parametrize("format", EIGHT_BITS)
def test_8_bit_format_passes_all_checks_and_is_as_good_as_merged(
    versions: list[Any], format: Format, report: Report
) -> None:
    formats, base = versions[0]["formats"], versions[0]["base_evaluation"]["nll"]["value"]
    merged, rounded = (formats[name]["evaluation"]["nll"]["value"] for name in (Format.MERGED, format))
    assert len(formats[format]["probes"]) == 8
    assert abs(rounded - merged) < (base - merged) / 10
    assert any(check["name"] == f"{format}: weight rounding" for check in versions[0]["parity"]["checks"])
    report(f"{format}: NLL base {base:.3f}, merged {merged:.3f}, {format} {rounded:.3f}")


def test_int8_versions_replace_each_other_in_place(
    versions: list[Any], formats_home: Path, client: openai.OpenAI
) -> None:
    """The server chooses INT8 before FP8 and merged weights, and compares the probes after the reload."""
    messages: Any = PROMPTS[0]
    for version in (None, "tiny@2", "tiny@1"):
        if version:
            swap: Any = svc_json(formats_home, "promote", version, *ANY_QUALITY)
            assert swap["kind"] == "inplace"
            assert swap["outcome"] == "promoted"
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, max_tokens=5)
        assert raw.headers["x-model-version"] == (version or "tiny@1")
    (model,) = svc_json(formats_home, "status")["models"]
    assert model["target"]["format"] == "int8"
