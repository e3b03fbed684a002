"""The example for OpenAI's client uploads, trains and chats on the real engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import openai

from examples.service import serving
from tests.e2e.conftest import PROMPTS

PORT = 8955
EXAMPLE = Path(__file__).parents[2] / "examples" / "openai-client" / "finetune.py"


def test_example_trains_a_model_and_chats_with_it_on_a_new_home(workplace: Path, tmp_path: Path) -> None:
    bases = json.dumps({"small": str(workplace / "base")})
    with serving(tmp_path, None, PORT, environment={"SVC_FINE_TUNING__BASES": bases}) as url:
        question = PROMPTS[0][-1]["content"]
        command = [sys.executable, EXAMPLE, "--base-url", f"{url}/v1", "--model", "small", "--question", question]
        done = subprocess.run(
            [*command, "--train", workplace / "train.jsonl"], text=True, capture_output=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "The job has successfully completed" in done.stdout
        model = re.search(r"^(ft:small:tuneserve:example:\w+): ", done.stdout, re.MULTILINE)
        assert model
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert model[1] in {each.id for each in client.models.list()}
        [job] = client.fine_tuning.jobs.list()
        [results] = job.result_files
        assert client.files.content(results).text.startswith("step,train_loss")
