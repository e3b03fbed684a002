"""Tests the whole workflow, with everything real except for a small model: train, qualify, serve, chat,
promote under load, refuse bad versions, and survive the engine's death. The tests in this folder share
one server. The tests in this file run in order, and test_shutdown stops the server.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from examples.load import Load
from examples.service import engine_pid, svc, svc_json, wait_until_ready
from examples.tamper import alter_weights, replace_weights
from svc.engine.client import EngineClient
from svc.engine.device import read_capabilities
from svc.engine.probes import engine_facts
from svc.engine.vllm.folders import socket_folder
from svc.engine.vllm.launch import SOCKET_FILE
from svc.evaluation.evaluator import mean_logprob
from svc.registry.registry import Registry
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from svc.store.database import open_database
from svc.store.holdouts import HoldoutCause, newest_holdout_run
from svc.store.tables import RequestRow
from svc.version import Format, Target, VersionId
from tests.e2e.conftest import Report, train_command
from tests.e2e.instance import ANY_QUALITY, figures
from tests.e2e.server import HELDOUT_EXAMPLES, PORT, Server

pytestmark = [pytest.mark.slow]

Found = TypeVar("Found")


def test_registered_merged_and_gptq_formats_include_probes_and_evaluation_results(home: Path) -> None:
    shown = svc_json(home, "show", "tiny@1")
    assert set(shown["formats"]) == {"adapter", "merged", "gptq"}
    for name in ("merged", "gptq"):
        assert len(shown["formats"][name]["probes"]) == 8
        assert shown["formats"][name]["evaluation"]["examples"] == HELDOUT_EXAMPLES
    assert shown["formats"]["merged"]["evaluation"]["nll"]["value"] < shown["base_evaluation"]["nll"]["value"]


def test_verification_probes_record_the_engine_dtype_and_kernel(home: Path) -> None:
    able, manifest = read_capabilities(home), Registry.of(Settings(home=home)).manifest(VersionId("tiny", 1))
    engine = EngineSettings()
    for format in (Format.MERGED, Format.GPTQ):
        facts = {probe.engine for probe in manifest.formats[format].probes}
        assert facts == {engine_facts(engine, able, home / "models" / "tiny" / "1" / format)}
    (gptq,) = {probe.engine for probe in manifest.formats[Format.GPTQ].probes}
    (merged,) = {probe.engine for probe in manifest.formats[Format.MERGED].probes}
    assert (gptq.dtype, gptq.kernel) == ("bfloat16", able.gptq_kernel(engine))
    assert merged.dtype == ("bfloat16" if able.cpu_bfloat16 else "float32")


def test_log_probability_of_each_held_out_answer_is_stored_with_the_version(home: Path) -> None:
    registry = Registry.of(Settings(home=home))
    for format in (Format.MERGED, Format.GPTQ):
        results = registry.results(VersionId("tiny", 1), format)
        assert len(results) == len(registry.heldout(VersionId("tiny", 1)))
        assert all(result.logprob is not None and result.logprob < 0 < result.nll for result in results)
        assert all(0 < result.tokens <= 8 for result in results)


def test_rerunning_the_same_recipe_does_not_register_a_second_version(home: Path, workplace: Path) -> None:
    assert svc_json(home, *train_command(workplace))["version"] == "tiny@1"
    assert len(svc_json(home, "models")) == 2


def test_response_header_tells_the_official_client_which_version_answered(server: Server) -> None:
    messages: Any = server.prompts[0]
    raw = server.client.chat.completions.with_raw_response.create(model="tiny", messages=messages, max_tokens=5)
    assert raw.headers["x-model-version"] == "tiny@1"
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer.usage
    assert answer.usage.completion_tokens == 5


def test_streamed_text_matches_the_complete_answer(server: Server) -> None:
    messages: Any = server.prompts[1]
    stream = server.client.chat.completions.create(
        model="tiny@1", messages=messages, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == server.answer(1)


def test_held_out_evaluation_reproduces_the_results_recorded_at_registration(server: Server, report: Report) -> None:
    target = Target(VersionId("tiny", 1), Format.GPTQ)
    store, registry = open_database(server.home), Registry.of(Settings(home=server.home))
    run = _wait_for(lambda: newest_holdout_run(store, target))
    registered = registry.results(target.version, target.format)
    assert run.cause in (HoldoutCause.START, HoldoutCause.SWAP)  # other tests may have swapped before
    assert run.hits == tuple(result.hit for result in registered)
    differences = [abs(nll - result.nll) for nll, result in zip(run.nll, registered, strict=True)]
    report(f"held-out set again: NLL differs by {max(differences):.4f} at most")
    assert max(differences) < 0.05


def test_live_answer_is_scored_by_the_log_probability_the_engine_computes(server: Server) -> None:
    """The live score differs from the registered one, because the model's random answers are re-tokenized differently.

    Needs the real engine: only it computes the log-probabilities of which a score consists.
    """
    registered = Registry.of(Settings(home=server.home)).results(VersionId("tiny", 1), Format.GPTQ)
    messages: Any = server.prompts[0]
    raw = server.client.chat.completions.with_raw_response.create(
        model="tiny", messages=messages, max_tokens=8, temperature=0
    )
    text = raw.parse().choices[0].message.content or ""
    assert text == registered[0].answer
    mine = select(RequestRow.logprob).where(RequestRow.request_id == raw.headers["x-request-id"])

    def score() -> float | None:
        with Session(open_database(server.home)) as session:
            return session.scalar(mine)

    async def score_again() -> float:
        async with EngineClient.of(socket_folder(server.home, 0) / SOCKET_FILE, "tiny") as engine:
            return await mean_logprob(engine, await engine.prompt_tokens(messages), (await engine.tokens(text))[:8])

    assert _wait_for(score) == pytest.approx(asyncio.run(score_again()), abs=0.01)


def _wait_for(find: Callable[[], Found | None], timeout_s: float = 120) -> Found:
    """Wait until a result is found, and return it."""
    deadline = time.monotonic() + timeout_s
    while (result := find()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result


def test_held_out_loss_from_training_matches_the_negative_log_likelihood_from_the_engine(
    server: Server, report: Report
) -> None:
    """The tokens and weights of the examples are the same, and only rounding in the engines differs."""
    manifest = Registry.of(Settings(home=server.home)).manifest(VersionId("tiny", 1))
    evaluation, parity = manifest.formats[Format.MERGED].evaluation, manifest.parity
    assert evaluation is not None
    assert parity is not None
    result = json.loads((server.home / "runs" / manifest.run / "train.json").read_text())["result"]
    (*_, last) = (point for point in result["points"] if point["heldout_loss"] is not None)
    loss = last["heldout_loss"]
    assert last["step"] == result["steps"]
    floor = parity.differences["merged on the engine compared with trained"]
    report(f"held-out loss {loss:.4f}, NLL on the engine {evaluation.nll.value:.4f}, floor {floor.mean:.4f}")
    assert abs(loss - evaluation.nll.value) <= max(0.02, 3 * floor.mean)


def test_all_parity_checks_pass_and_an_html_report_is_written(server: Server) -> None:
    for version in ("tiny@1", "tiny@2"):
        shown: Any = svc_json(server.home, "show", version, "--parity")
        assert [check for check in shown["checks"] if not check["passed"]] == []
        assert {"merged", "gptq", "merge"} == {check["name"].partition(":")[0] for check in shown["checks"]}
        assert set(shown["speed"]) == {"merged", "gptq"}
    registry = Registry.of(Settings(home=server.home))
    assert registry.reference(VersionId("tiny", 1), "parity.html").stat().st_size > 1000


def test_request_for_prompt_logprobs_is_rejected(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.answer(0, extra_body={"prompt_logprobs": 1})
    assert caught.value.param == "prompt_logprobs"


def test_prompt_longer_than_context_returns_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "long " * 5000}])
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model_returns_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])


def test_promotion_and_rollback_under_load_neither_lose_requests_nor_mix_up_answers(
    server: Server, report: Report
) -> None:
    expected = {"tiny@1": server.answers()}
    with Load(server.url, "tiny", server.prompts) as load:
        load.wait_for(16)
        promoted = svc_json(server.home, "promote", "tiny@2", *ANY_QUALITY)
        load.wait_for(16)
        rolled_back = svc_json(server.home, "rollback", "tiny")
        load.wait_for(16)
    assert server.answers() == expected["tiny@1"], "rolled back to other weights"
    svc_json(server.home, "promote", "tiny@2", *ANY_QUALITY)
    expected["tiny@2"] = server.answers()
    report(figures(load, promoted))
    report(f"and back: {figures(load, rolled_back)}")
    assert load.failed == []
    assert {answer.version for answer in load.answers} == {"tiny@1", "tiny@2"}
    assert expected["tiny@1"] != expected["tiny@2"]
    for answer in load.answers:
        assert answer.text == expected[answer.version][answer.prompt]
    assert (promoted["kind"], rolled_back["kind"]) == ("inplace", "inplace")
    assert promoted["running"] > 0
    svc_json(server.home, "rollback", "tiny")


def test_promotion_is_refused_if_a_file_hash_changed_after_registration(server: Server) -> None:
    before = server.answers()
    alter_weights(server.folder(2), server.folder(3), "gptq")
    refused = svc(server.home, "promote", "tiny@3", *ANY_QUALITY, capture_output=True)
    assert refused.returncode == 14
    assert "was changed after registration" in refused.stderr
    assert server.answers() == before


def test_promotion_is_refused_if_verification_probes_detect_the_weights_of_a_different_model(server: Server) -> None:
    before = server.answers()
    replace_weights(server.folder(2), server.folder(4), "gptq", weights_of=server.folder(1))
    with Load(server.url, "tiny", server.prompts) as load:
        load.wait_for(8)
        refused = svc(server.home, "promote", "tiny@4", *ANY_QUALITY, capture_output=True)
        load.wait_for(8)
    assert refused.returncode == 14
    assert "probe" in refused.stderr
    assert load.failed == []
    assert {answer.version for answer in load.answers} == {"tiny@1"}
    assert all(answer.text == before[answer.prompt] for answer in load.answers)
    assert server.status()["last_swap"]["outcome"] == "restored"
    assert server.answers() == before


def test_promoting_a_nonexistent_version_fails(server: Server) -> None:
    assert svc(server.home, "promote", "tiny@77", capture_output=True).returncode == 8


def test_starting_a_second_server_with_the_same_home_folder_or_port_fails(server: Server, tmp_path: Path) -> None:
    assert svc(server.home, "serve", "tiny", "--port", "0", capture_output=True).returncode == 7
    assert svc(tmp_path, "serve", "tiny", "--port", str(PORT), capture_output=True).returncode == 7


def test_status_shows_engine_dtype_and_kernel(server: Server) -> None:
    plan = {row["name"]: row for row in svc_json(server.home, "status", "--verbose")["models"][0]["engine"]["plan"]}
    kernel = read_capabilities(server.home).gptq_kernel(EngineSettings())
    assert plan["gptq_kernel"]["value"] == kernel
    assert plan["dtype"]["value"] == "bfloat16"
    assert plan["dtype"]["reason"]


def test_status_and_metrics_show_served_requests(server: Server) -> None:
    status = server.status()
    figures = status["versions"]["tiny@1"]
    assert figures["requests"] > 16
    assert 0 < figures["duration_s"]["0.5"] <= figures["duration_s"]["0.99"]
    assert figures["first_token_s"]["0.5"] > 0
    page = httpx.get(f"{server.url}/metrics").text
    assert 'svc_engine_state{model="tiny",state="ready"} 1.0' in page
    assert 'svc_swaps_total{model="tiny",outcome="restored"} 1.0' in page


def test_dead_engine_is_restarted_and_serves_again(server: Server) -> None:
    """Needs the real engine: SIGKILL must leave no process of vLLM behind, and the new engine must answer as before."""
    before = server.answers()
    pid = engine_pid(server.home)
    with Load(server.url, "tiny", server.prompts, max_tokens=400) as load:
        load.wait_for(1)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        load.wait_for(8)
    assert load.failed
    wait_until_ready(server.url, None, server.home / "logs" / "serve.log", 180)
    status = server.status()
    assert status["engine"]["restarts"] == 1
    assert "died" in status["engine"]["last_error"]
    assert server.answers() == before
    assert not psutil.pid_exists(pid)
