"""OpenAI's client trains on the real engine of a new home: the example, checkpoints, and a batch."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from examples.service import serving, svc_json
from tests.e2e.conftest import PROMPTS

pytestmark = [pytest.mark.slow]

PORT = 8955
EXAMPLE = Path(__file__).parents[2] / "examples" / "openai-client" / "finetune.py"


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty home."""
    return tmp_path_factory.mktemp("fine-tuning")


@pytest.fixture(scope="module")
def client(empty_home: Path, workplace: Path) -> Iterator[OpenAI]:
    """Yield a client of a server that serves no model and trains one base."""
    bases = json.dumps({"small": str(workplace / "base")})
    with serving(empty_home, None, PORT, environment={"SVC_FINE_TUNING__BASES": bases}) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)


def ask(client: OpenAI, model: str) -> str:
    messages: Any = PROMPTS[0]
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    return answer.choices[0].message.content or ""


def test_fine_tuning_example_script_trains_a_model_and_chats_with_it(client: OpenAI, workplace: Path) -> None:
    """Needs the real engine: it evaluates the trained model, and answers the example's question with its adapter."""
    options = {"--base-url": str(client.base_url), "--model": "small", "--question": PROMPTS[0][-1]["content"]}
    words = [word for option in options.items() for word in option]
    done = subprocess.run(
        [sys.executable, EXAMPLE, *words, "--train", workplace / "train.jsonl", "--epochs", "2"],
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The job has successfully completed" in done.stdout
    model = re.search(r"^(ft:small:tuneserve:example:\w+): ", done.stdout, re.MULTILINE)
    assert model
    assert model[1] in {each.id for each in client.models.list()}


def test_fine_tuned_model_and_its_checkpoint_are_served_by_one_engine(client: OpenAI, empty_home: Path) -> None:
    [job] = client.fine_tuning.jobs.list()
    first, last = sorted(client.fine_tuning.jobs.checkpoints.list(job.id), key=lambda each: each.step_number)
    assert job.fine_tuned_model == last.fine_tuned_model_checkpoint  # its weights are those of the model
    [row] = svc_json(empty_home, "jobs", "list")
    assert row["fine_tuned_model"] == job.fine_tuned_model
    assert ask(client, job.fine_tuned_model) == ask(client, "ft-local-example@1")
    assert ask(client, first.fine_tuned_model_checkpoint)
    [results] = job.result_files
    lines = client.files.content(results).text.splitlines()
    assert lines[0].startswith("step,train_loss")
    assert int(lines[-1].partition(",")[0]) == last.step_number


def test_batch_answers_match_live_answers_of_the_same_model(client: OpenAI) -> None:
    [job] = client.fine_tuning.jobs.list()
    model = job.fine_tuned_model or ""
    body = {"model": model, "messages": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    text = "\n".join(json.dumps({"custom_id": str(number), **line}) for number in range(20))
    file = client.files.create(file=("requests.jsonl", io.BytesIO(text.encode())), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.output_file_id
    answers = [json.loads(answer) for answer in client.files.content(batch.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {str(number) for number in range(20)}
    texts = {answer["response"]["body"]["choices"][0]["message"]["content"] for answer in answers}
    assert ask(client, model) in texts
