"""Builds versions that are served as adapters, and requests for them."""

from typing import Any

import httpx

from svc.version import Format, Target
from tests.serving.control import BODY, Control
from tests.serving.engine_double import EngineDouble
from tests.serving.versions import make_version, target

BOTH = (Format.MERGED, Format.ADAPTER)


def adapter(number: int) -> Target:
    """Return a version of the model as a target that is served as an adapter."""
    return target(number, Format.ADAPTER)


def versions(control: Control, *numbers: int, **said: Any) -> None:
    """Register additional versions."""
    for number in numbers:
        make_version(control.registry, number, formats=BOTH, **said)


async def ask(client: httpx.AsyncClient, model: str, **said: Any) -> tuple[int, str, str]:
    """Return the response status, the version in the header, and the number in the text or the error code."""
    answer = await client.post("/v1/chat/completions", json=BODY | {"model": model} | said)
    body = answer.json()
    text = body["error"]["code"] if "error" in body else body["choices"][0]["message"]["content"].partition(".")[0]
    return answer.status_code, answer.headers.get("x-model-version", ""), text


def numbers(double: EngineDouble) -> list[int]:
    """Return the version numbers that an engine has loaded."""
    return sorted(int(folder.split("/")[-2]) for folder in double.adapters.values())
