"""Tests `svc compare` on the real engine: stored answers, base and version in one engine, remote endpoint."""

import json
from pathlib import Path

import pytest

from examples.service import svc, svc_json
from tests.e2e.server import HELDOUT_EXAMPLES, Server

pytestmark = [pytest.mark.slow]


def test_compare_command_uses_the_evaluation_results_stored_at_registration(home: Path) -> None:
    compared = svc_json(home, "compare", "tiny@1", "tiny@2")
    assert (compared["a"]["name"], compared["b"]["name"]) == ("tiny@1 (gptq)", "tiny@2 (gptq)")
    assert [compared[side]["kept"] for side in "ab"] == [True, True]
    assert compared["examples"] == len(compared["answers"]) == HELDOUT_EXAMPLES
    shown = svc_json(home, "show", "tiny@1")["formats"]["gptq"]["evaluation"]
    primary = compared["primary"]
    assert compared["metrics"][primary]["first"] == shown["metrics"][primary]["estimate"]
    assert compared["metrics"]["nll"]["first"] == shown["nll"]


def test_compare_command_serves_a_base_and_its_fine_tuned_version_from_one_engine(home: Path, workplace: Path) -> None:
    """Needs the real engine: the version is loaded in place into the engine that has answered for the base."""
    options = ("--format", "merged", "--limit", "6", "--fresh", "--json")
    asked = svc(home, "compare", str(workplace / "base"), "tiny@1", *options, capture_output=True)
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr.count("engine …") == 1
    compared = svc_json(home, "compare", str(workplace / "base"), "tiny@1", "--format", "merged", "--limit", "6")
    assert [compared[side]["kept"] for side in "ab"] == [True, True]
    assert compared["metrics"]["nll"]["second"]["value"] < compared["metrics"]["nll"]["first"]["value"]


def test_version_gives_the_same_answers_locally_and_through_a_remote_endpoint(server: Server) -> None:
    endpoint = f"{server.url}/v1#tiny@1"
    done = svc(server.home, "compare", "tiny@1", endpoint, "--limit", "6", "--json", capture_output=True)
    assert f"the prompts of 6 examples will be sent to {server.url}/v1" in done.stderr
    compared = json.loads(done.stdout)
    assert "nll" not in compared["metrics"]
    assert [row["a"]["answer"] for row in compared["answers"]] == [row["b"]["answer"] for row in compared["answers"]]
    assert compared["direction"] == "undecided"


def test_forgetting_is_reported_for_the_merged_and_gptq_formats_of_a_version(home: Path) -> None:
    formats = svc_json(home, "show", "tiny@1")["forgetting"]
    assert list(formats) == ["merged", "gptq"]
    assert formats["merged"]["before"] == formats["gptq"]["before"]
    forgetting = formats["gptq"]
    assert forgetting["examples"] == 60
    assert 0 < forgetting["nll_before"]["low"] <= forgetting["nll_before"]["value"]
    assert (
        forgetting["nll_difference"]["low"]
        <= forgetting["nll_difference"]["value"]
        <= forgetting["nll_difference"]["high"]
    )
