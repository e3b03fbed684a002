"""Tests every method on the real engine: trained by command, evaluated, quantized and served to a client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.service import serving, svc_json
from svc.version import Format
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY
from trainer.recipe.adapter import Method

pytestmark = [pytest.mark.matrix]

PORT = 8741
RATES = {Method.FULL: 2e-3, Method.VERA: 0.1}
ADAPTERS = [method for method in Method if method not in (Method.LORA, Method.FULL)]
Versions = dict[Method, str]


@pytest.fixture(scope="module")
def methods_home(workplace: Path) -> Path:
    return workplace / "methods-home"


@pytest.fixture(scope="module")
def versions(workplace: Path, methods_home: Path) -> Versions:
    """Return one version trained with each method."""
    made = {}
    for method in Method:
        sets = [f"method={method}", f"train.learning_rate={RATES.get(method, 0.02)}"]
        sets += [] if method is Method.FULL else ["qualify.restart=false"]
        options = [part for value in sets for part in ("--set", value)]
        trained: Any = svc_json(methods_home, "train", str(workplace / "recipe.yaml"), *options)
        made[method] = trained["version"]
    return made


@pytest.fixture(scope="module")
def client(versions: Versions, methods_home: Path) -> Iterator[openai.OpenAI]:
    with (
        serving(methods_home, versions[Method.LORA], PORT) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.parametrize("method", Method)
def test_every_training_method_is_evaluated_and_registered(
    versions: Versions, methods_home: Path, method: Method, report: Report
) -> None:
    shown: Any = svc_json(methods_home, "show", versions[method])
    formats, base = shown["formats"], shown["base_evaluation"]["nll"]["value"]
    assert (Format.ADAPTER in formats) is (method is not Method.FULL)
    nll = {name: formats[name]["evaluation"]["nll"]["value"] for name in (Format.MERGED, Format.GPTQ)}
    assert nll[Format.MERGED] < base
    assert all(len(formats[name]["probes"]) == 8 for name in nll)
    report(f"{method}: NLL base {base:.3f}, merged {nll[Format.MERGED]:.3f}, GPTQ {nll[Format.GPTQ]:.3f}")


@pytest.mark.parametrize("method", [Method.LORA, *ADAPTERS, Method.FULL])
def test_version_trained_with_any_method_is_served(
    versions: Versions, methods_home: Path, client: openai.OpenAI, method: Method
) -> None:
    if method is not Method.LORA:
        swap: Any = svc_json(methods_home, "promote", versions[method], *ANY_QUALITY)
        # Adapters do not change the embedding, which is also this model's output layer; full fine-tuning does.
        assert swap["kind"] == ("bluegreen" if method is Method.FULL else "inplace")
    messages: Any = PROMPTS[0]
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=messages, max_tokens=5)
    assert raw.headers["x-model-version"] == versions[method]
    assert raw.parse().choices[0].message.content
