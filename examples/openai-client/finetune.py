"""Fine-tune a model through OpenAI's client, and chat with it.

It needs only the package `openai` and a running `svc serve` with `fine_tuning.bases` (docs/fine-tuning-api.md):

    python examples/openai-client/finetune.py --model small --train train.jsonl --question "It will not start."
"""

import argparse
import sys
import time
from itertools import takewhile
from pathlib import Path

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent


def upload(client: OpenAI, path: Path) -> str:
    """Upload examples, and return the file's id once they have been checked."""
    with path.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    checked = client.files.wait_for_processing(uploaded.id, poll_interval=1.0)
    if checked.status == "error":
        sys.exit(f"{path}: {checked.status_details}")
    return checked.id


def events_after(client: OpenAI, job: str, last: str | None) -> list[FineTuningJobEvent]:
    """Return a job's events after the last one that was read, oldest first."""
    newest_first = client.fine_tuning.jobs.list_events(job)
    return list(takewhile(lambda event: event.id != last, newest_first))[::-1]


def follow(client: OpenAI, job: FineTuningJob) -> FineTuningJob:
    """Print a job's events until it has ended, and return it."""
    last = None
    while True:
        ended = job.status in ("succeeded", "failed", "cancelled")
        for event in events_after(client, job.id, last):
            print(f"{time.strftime('%H:%M:%S', time.localtime(event.created_at))} {event.message}", flush=True)
            last = event.id
        if ended:
            return job
        time.sleep(2.0)
        job = client.fine_tuning.jobs.retrieve(job.id)


def main() -> None:
    """Upload, train and chat."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--api-key", default="none")
    options.add_argument("--model", required=True, help="a name in `fine_tuning.bases`")
    options.add_argument("--train", required=True, type=Path, help="a file of chat examples")
    options.add_argument("--question", required=True)
    options.add_argument("--epochs", type=int, default=1)
    given = options.parse_args()

    client = OpenAI(base_url=given.base_url, api_key=given.api_key)
    job = client.fine_tuning.jobs.create(
        model=given.model,
        training_file=upload(client, given.train),
        suffix="example",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": given.epochs}}},
        extra_body={"recipe": {"formats": ["adapter"]}},
    )
    job = follow(client, job)
    if job.fine_tuned_model is None:
        sys.exit(f"{job.status}: {job.error.message if job.error else 'no error'}")
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": given.question}], max_tokens=50
    )
    print(f"{job.fine_tuned_model}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
