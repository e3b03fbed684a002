"""Tests the endpoints for fine-tuning jobs with the official client."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from sqlalchemy import Engine as Store

from serving.files.rows import FileStatus, Purpose, remove_file, set_file_status
from serving.fine_tuning.creation import JobCreation, decide_job
from serving.fine_tuning.rows import JobCheckpoint, add_checkpoint, add_event, find_job
from serving.fine_tuning.training_check import CheckFailedError, CheckTimeoutError, TrainingCheck
from serving.store_changes.changes import Changes
from svc.errors import BaseModelError, DataError, NotFoundError, RecipeError
from svc.identity.principal import Scope
from svc.settings.client_apis import TrainingPlace
from svc.settings.settings import Settings
from svc.store import audit
from svc.store.statuses import JobStatus
from tests.builders.jobs import change_job
from tests.serving.control import until
from tests.serving.fine_tuning.fine_tuning_service import BASE, FakeCheck, FineTuningService, strict

NO_METRICS = {
    "step": 10.0,
    "train_loss": 0.5,
    "train_mean_token_accuracy": None,
    "valid_loss": 0.6,
    "valid_mean_token_accuracy": None,
    "full_valid_loss": None,
    "full_valid_mean_token_accuracy": None,
}


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> FakeCheck:
    """Return the check of trainings that the service uses."""
    check = FakeCheck()
    monkeypatch.setattr("serving.server.assembly.JobCreation", partial(JobCreation, check=check))
    return check


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return the folder of a base whose weights are not read."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.safetensors").touch()
    return tmp_path / "base"


@pytest.fixture
async def service(socket_folder: Path, store: Store, check: FakeCheck, base: Path) -> AsyncIterator[FineTuningService]:
    service = FineTuningService(socket_folder, store=store, base=base)
    async with service.run():
        yield service


@pytest.fixture
async def client(service: FineTuningService) -> AsyncIterator[AsyncOpenAI]:
    async with service.official() as client:
        yield client


async def raw(client: AsyncOpenAI, path: str = "", **query: Any) -> Any:
    """Return the JSON that the server sends for a path."""
    return await client.get(f"/fine_tuning/jobs{path}", cast_to=object, options={"params": query})


async def decide(service: FineTuningService, id: str, check: FakeCheck) -> None:
    """Decide a job whose files are being checked, as the server does regularly."""
    assert service.store is not None
    await decide_job(service.store, service.files, service.settings, find_job(service.store, id, None), check)


@pytest.mark.slow
async def test_job_creation_returns_a_complete_job_object(service: FineTuningService, client: AsyncOpenAI) -> None:
    file, heldout = service.add_file(), service.add_file()
    created = await client.fine_tuning.jobs.create(
        model=BASE, training_file=file, validation_file=heldout, suffix="tickets", seed=3, metadata={"team": "a"}
    )
    job = strict(FineTuningJob, await raw(client, f"/{created.id}"))
    assert job == await client.fine_tuning.jobs.retrieve(created.id)
    assert (job.status, job.model, job.seed, job.organization_id) == ("queued", BASE, 3, "tuneserve")
    assert (job.training_file, job.validation_file) == (file, heldout)
    assert job.metadata == {"team": "a"}
    assert job.method is not None and job.method.type == "supervised"
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (3, 16)
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert (job.fine_tuned_model, job.finished_at, job.error, job.trained_tokens) == (None, None, None, None)
    assert job.estimated_finish is not None and job.estimated_finish - job.created_at in (179, 180, 181)


@pytest.mark.slow
async def test_preference_job_has_the_hyperparameters_of_its_method(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    created = await client.fine_tuning.jobs.create(
        model=BASE,
        training_file=service.add_file(),
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1, "batch_size": "auto"}}},
    )
    job = strict(FineTuningJob, await raw(client, f"/{created.id}"))
    assert job.method is not None and job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert job.method.dpo.hyperparameters.n_epochs == 1
    assert job.method.supervised is None


@pytest.mark.slow
async def test_preference_job_is_rejected_when_jobs_are_trained_on_ray(
    socket_folder: Path, store: Store, check: FakeCheck, base: Path
) -> None:
    service = FineTuningService(socket_folder, store=store, base=base, place=TrainingPlace.RAY)
    async with service.run(), service.official() as client:
        file = service.add_file()
        with pytest.raises(openai.BadRequestError, match="where preference tuning is not supported") as caught:
            await client.fine_tuning.jobs.create(model=BASE, training_file=file, method={"type": "dpo", "dpo": {}})
    assert caught.value.param == "method"


async def test_recipe_includes_settings_from_the_extra_body_of_the_request(
    service: FineTuningService, client: AsyncOpenAI, store: Store, base: Path
) -> None:
    recipe = {"method": "dora", "adapter": {"rank": 8}, "formats": ["adapter"], "evaluate": {"max_forgetting": 0.1}}
    file = service.add_file()
    created = await client.fine_tuning.jobs.create(model=BASE, training_file=file, extra_body={"recipe": recipe})
    written = yaml.safe_load(find_job(store, created.id, None).recipe)
    assert {key: written[key] for key in recipe} == recipe
    assert written["name"] == f"ft-local-{BASE}"
    assert written["base"] == str(base)
    assert written["data"] == {"train": str(service.files.path(file))}


@pytest.mark.slow
async def test_succeeded_and_failed_jobs_are_returned_as_complete_job_objects(
    service: FineTuningService, client: AsyncOpenAI, store: Store
) -> None:
    ended = {"finished_at": datetime.now(UTC), "trained_tokens": 12345}
    good = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    change_job(
        store, good.id, status="succeeded", fine_tuned_model="ft:a:b::c", result_file="file-r", number=1, **ended
    )
    bad = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    error = {"code": "exploded", "message": "the loss is not finite", "param": None}
    change_job(store, bad.id, status="failed", error=json.dumps(error), **ended)
    succeeded = strict(FineTuningJob, await raw(client, f"/{good.id}"))
    failed = strict(FineTuningJob, await raw(client, f"/{bad.id}"))
    assert (succeeded.fine_tuned_model, succeeded.result_files) == ("ft:a:b::c", ["file-r"])
    assert (succeeded.trained_tokens, succeeded.estimated_finish) == (12345, None)
    assert succeeded.finished_at is not None
    assert failed.error is not None and failed.error.code == "exploded"


@pytest.mark.slow
async def test_jobs_are_listed_in_pages_newest_first(service: FineTuningService, client: AsyncOpenAI) -> None:
    ids = [
        (await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file(), seed=seed)).id
        for seed in range(5)
    ]
    assert [job.id async for job in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    page = await client.fine_tuning.jobs.list(limit=2, after=ids[3])
    assert ([job.id for job in page.data], page.has_more) == ([ids[2], ids[1]], True)
    for job in (await raw(client))["data"]:
        strict(FineTuningJob, job)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.fine_tuning.jobs.list(after="ftjob-none")
    assert caught.value.param == "after"


@pytest.mark.slow
async def test_jobs_are_filtered_by_metadata(service: FineTuningService, client: AsyncOpenAI) -> None:
    file, ids = service.add_file(), []
    for metadata in ({"team": "a", "x": ""}, {"team": "b"}, None):
        created = await client.fine_tuning.jobs.create(model=BASE, training_file=file, metadata=metadata)
        ids.append(created.id)
    assert [job.id async for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [ids[0]]
    assert [job.id async for job in client.fine_tuning.jobs.list(metadata={"team": "a", "x": ""})] == [ids[0]]
    assert [job.id async for job in client.fine_tuning.jobs.list(metadata={"team": "c"})] == []
    assert [job["id"] for job in (await raw(client, metadata="null"))["data"]] == [ids[2]]
    with pytest.raises(openai.BadRequestError) as caught:
        await raw(client, metadata="all")
    assert caught.value.param == "metadata"


@pytest.mark.slow
async def test_events_are_listed_in_pages_newest_first(
    service: FineTuningService, client: AsyncOpenAI, store: Store
) -> None:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    add_event(store, job.id, "Step 1/10: loss 0.5", metrics={"step": 1, "train_loss": 0.5})
    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=1)]
    assert [event.message for event in events] == [
        "Step 1/10: loss 0.5",
        "Files validated, moving job to queued state",
        f"Created fine-tuning job: {job.id}",
    ]
    assert (events[0].type, events[0].data) == ("metrics", {"step": 1, "train_loss": 0.5})
    for event in (await raw(client, f"/{job.id}/events"))["data"]:
        strict(FineTuningJobEvent, event)
    for after in ("ftevent-0", "ftevent-x", "x", "ftevent-" + "9" * 30):
        with pytest.raises(openai.NotFoundError):
            await client.fine_tuning.jobs.list_events(job.id, after=after)


@pytest.mark.slow
async def test_checkpoints_are_listed_in_pages_newest_first(
    service: FineTuningService, client: AsyncOpenAI, store: Store
) -> None:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    for step in (10, 20, 30):
        moment = datetime.now(UTC) + timedelta(seconds=step)
        model = f"ft:small:org:x:1:ckpt-step-{step}"
        add_checkpoint(store, JobCheckpoint(f"ftckpt_{step}", job.id, moment, step, model, json.dumps(NO_METRICS)))
    listed = [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)]
    assert [each.step_number for each in listed] == [30, 20, 10]
    checkpoint = strict(FineTuningJobCheckpoint, (await raw(client, f"/{job.id}/checkpoints"))["data"][0])
    assert checkpoint.fine_tuning_job_id == job.id
    assert checkpoint.fine_tuned_model_checkpoint == "ft:small:org:x:1:ckpt-step-30"


@pytest.mark.slow
async def test_job_can_be_paused_and_resumed_and_then_cancelled(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    assert (await client.fine_tuning.jobs.pause(job.id)).status == "queued"
    assert (await client.fine_tuning.jobs.resume(job.id)).status == "queued"
    cancelled = await client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.estimated_finish) == ("cancelled", None)
    assert cancelled.finished_at is not None
    assert await client.fine_tuning.jobs.cancel(job.id) == cancelled
    messages = [event.message async for event in client.fine_tuning.jobs.list_events(job.id)]
    assert "Fine-tuning job paused" in messages
    strict(FineTuningJob, await raw(client, f"/{job.id}"))


@pytest.mark.slow
async def test_finished_job_cannot_be_modified_and_the_client_does_not_retry(
    service: FineTuningService, client: AsyncOpenAI, store: Store
) -> None:
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    change_job(store, job.id, status="succeeded")
    jobs = client.with_options(max_retries=2).fine_tuning.jobs
    for changing in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.BadRequestError, match="already ended: succeeded") as caught:
            await changing(job.id)
        assert caught.value.code == "job_ended"
        assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.slow
async def test_identical_concurrent_create_requests_create_one_job(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck
) -> None:
    file = service.add_file()
    created = await asyncio.gather(
        *(client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="x") for _ in range(20))
    )
    assert len({job.id for job in created}) == 1
    assert len(check.recipes) == 1
    again = await client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="x")
    assert again.id == created[0].id
    other = await client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="x", seed=1)
    assert other.id != created[0].id


@pytest.mark.slow
@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_job_creation_is_rejected_if_a_file_is_deleted_concurrently(
    socket_folder: Path, store: Store, base: Path, monkeypatch: pytest.MonkeyPatch, param: str
) -> None:
    async def check_and_delete(recipe: str, settings: Settings, *, timeout_s: float) -> TrainingCheck:
        service.files.delete(given[param])
        return TrainingCheck(examples=200, learning_rate=5e-4, seconds=60.0)

    monkeypatch.setattr("serving.server.assembly.JobCreation", partial(JobCreation, check=check_and_delete))
    service = FineTuningService(socket_folder, store=store, base=base)
    given: dict[str, Any] = {"training_file": service.add_file(), "validation_file": service.add_file()}
    async with service.run(), service.official() as client:
        with pytest.raises(openai.BadRequestError, match=f"there is no file '{given[param]}'") as caught:
            await client.fine_tuning.jobs.create(model=BASE, **given)
        assert caught.value.param == param
        assert (await client.fine_tuning.jobs.list()).data == []


@pytest.mark.slow
async def test_identical_create_requests_on_two_servers_create_one_job(
    service: FineTuningService, store: Store, socket_folder: Path, base: Path, check: FakeCheck
) -> None:
    (socket_folder / "other").mkdir()
    other, file = FineTuningService(socket_folder / "other", store=store, base=base), service.add_file()
    async with other.run(), service.official() as first, other.official() as second:
        jobs = [each.fine_tuning.jobs.create(model=BASE, training_file=file) for each in (first, second) * 10]
        assert len({job.id for job in await asyncio.gather(*jobs)}) == 1


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"model": "gpt-5"}, "model"),
    ({"model": "gone"}, "model"),
    ({"model": "ft:gpt-4o:org::abc"}, "model"),
    ({"model": "tickets@"}, "model"),
    ({"model": "a\0"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
    ({"training_file": "../../etc/passwd"}, "training_file"),
    ({"validation_file": "file-none"}, "validation_file"),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": "big"}}}}, None),
    ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters"),
    ({"suffix": "x" * 65}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
    ({"extra_body": {"unknown": 1}}, "unknown"),
    ({"extra_body": {"recipe": {"data": {"train": "/etc/passwd"}}}}, "recipe.data.train"),
    ({"extra_body": {"recipe": {"judge": {"url": "http://x"}}}}, "recipe.judge"),
    ({"extra_body": {"recipe": {"base": "gpt-5"}}}, "recipe.base"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
async def test_error_names_the_parameter_when_a_create_request_is_invalid(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck, fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.fine_tuning.jobs.create(**({"model": BASE, "training_file": service.add_file()} | fields))
    assert caught.value.type == "invalid_request_error"
    assert param is None or caught.value.param == param
    assert str(service.folder) not in caught.value.message
    assert (await client.fine_tuning.jobs.list()).data == []
    assert check.recipes == []


async def test_error_refers_to_mlflow_when_a_job_requests_weights_and_biases(
    service: FineTuningService, client: AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="training runs are recorded in MLflow"):
        await client.fine_tuning.jobs.create(
            model=BASE,
            training_file=service.add_file(),
            integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": []}}],
        )


@pytest.mark.parametrize(
    ("purpose", "status", "text"),
    [
        (Purpose.BATCH, FileStatus.PROCESSED, "has purpose batch; expected purpose fine-tune"),
        (Purpose.FINE_TUNE, FileStatus.ERROR, "line 7 is not JSON"),
    ],
)
async def test_job_with_an_unusable_training_file_is_rejected(
    service: FineTuningService, client: AsyncOpenAI, purpose: Purpose, status: FileStatus, text: str
) -> None:
    file = service.add_file(purpose=purpose, status=status, details="line 7 is not JSON")
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    assert caught.value.param == "training_file"


@pytest.mark.parametrize(
    ("result", "param", "text"),
    [
        (TrainingCheck(10, 1e-4, 1.0, refused="weights need 140 GB"), "model", "does not fit .*140 GB"),
        (DataError("{file}:7: no answer", expected="an answer"), "training_file", "400 - file-.*:7: no answer"),
        (RecipeError("'adapter.rank' is 5000: too large"), "method", "'adapter.rank' is 5000"),
        (BaseModelError("/secret/base has no config.json"), "model", "cannot be fine-tuned on this server"),
        (NotFoundError("tuned@1 has no merged weights"), "model", "cannot be fine-tuned here"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_job_is_rejected_when_its_training_would_fail(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck, result: Any, param: str, text: str
) -> None:
    file = service.add_file()
    if isinstance(result, DataError):
        result = DataError(result.wrong.format(file=service.files.path(file)), expected=result.expected)
    check.result = result
    with pytest.raises(openai.BadRequestError, match=text) as caught:
        await asyncio.gather(*(client.fine_tuning.jobs.create(model=BASE, training_file=file) for _ in range(3)))
    assert caught.value.param == param
    assert str(service.folder) not in caught.value.message
    assert "/secret" not in caught.value.message
    assert (await client.fine_tuning.jobs.list()).data == []


async def test_job_creation_returns_an_internal_error_if_the_training_check_crashes(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck
) -> None:
    check.result = CheckFailedError("Traceback ... /secret")
    with pytest.raises(openai.InternalServerError, match="internal error"):
        await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())


@pytest.mark.slow
async def test_job_waits_until_its_file_has_been_checked(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck, store: Store
) -> None:
    file = service.add_file(status=FileStatus.UPLOADED)
    created = await client.fine_tuning.jobs.create(
        model=BASE, training_file=file, hyperparameters={"learning_rate_multiplier": 2}
    )
    job = strict(FineTuningJob, await raw(client, f"/{created.id}"))
    assert (job.status, job.hyperparameters.n_epochs, job.estimated_finish) == ("validating_files", "auto", None)
    await decide(service, created.id, check)
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "validating_files"
    set_file_status(store, file, FileStatus.PROCESSED)
    await decide(service, created.id, check)
    job = strict(FineTuningJob, await raw(client, f"/{created.id}"))
    assert (job.status, job.hyperparameters.n_epochs) == ("queued", 3)
    assert job.estimated_finish is not None
    assert yaml.safe_load(find_job(store, job.id, None).recipe)["train"]["learning_rate"] == 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "result", "code", "param"),
    [
        (FileStatus.ERROR, None, "invalid_training_file", "training_file"),
        (None, None, "invalid_training_file", "training_file"),
        (FileStatus.PROCESSED, DataError("no answers"), "invalid_training_file", "training_file"),
        (FileStatus.PROCESSED, RecipeError("rank is too large"), "invalid_request", "method"),
        (FileStatus.PROCESSED, CheckFailedError("Traceback"), "server_error", None),
        (FileStatus.PROCESSED, CheckTimeoutError("it took 3600 s"), "invalid_request", None),
    ],
)
async def test_waiting_job_fails_if_its_file_is_unusable_or_its_training_check_fails(
    service: FineTuningService,
    client: AsyncOpenAI,
    check: FakeCheck,
    store: Store,
    status: FileStatus | None,
    result: Exception | None,
    code: str,
    param: str | None,
) -> None:
    file = service.add_file(status=FileStatus.UPLOADED)
    created = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    check.result = result or check.result
    if status is None:
        remove_file(store, file)
    else:
        set_file_status(store, file, status, "line 7 is not JSON")
    await decide(service, created.id, check)
    job = strict(FineTuningJob, await raw(client, f"/{created.id}"))
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, param)


async def test_job_with_an_unreadable_file_is_not_rejected_before_the_file_check_ends(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck
) -> None:
    check.result = DataError("line 7 is not JSON")
    file = service.add_file(status=FileStatus.UPLOADED)
    assert (await client.fine_tuning.jobs.create(model=BASE, training_file=file)).status == "validating_files"


async def test_job_stays_in_validation_when_its_training_check_times_out(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck
) -> None:
    check.result = CheckTimeoutError("too long")
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=service.add_file())
    assert job.status == "validating_files"


@pytest.mark.slow
async def test_server_queues_waiting_jobs_once_their_checks_have_passed(
    service: FineTuningService, client: AsyncOpenAI, check: FakeCheck, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.fine_tuning.creation._POLL_S", 0.01)
    file = service.add_file(status=FileStatus.UPLOADED)
    job = await client.fine_tuning.jobs.create(model=BASE, training_file=file)
    running = asyncio.create_task(JobCreation(store, service.files, service.settings, Changes(), check).run())
    set_file_status(store, file, FileStatus.PROCESSED)
    await until(lambda: find_job(store, job.id, None).status is JobStatus.QUEUED)
    running.cancel()


@pytest.mark.slow
async def test_keys_see_only_their_own_jobs_and_files(service: FineTuningService, store: Store) -> None:
    alice, bob = service.key(Scope.JOBS), service.key(Scope.JOBS)
    admin = service.key(Scope.ADMIN)
    file = service.add_file(owner=alice.key.id)
    async with service.official(alice) as first, service.official(bob) as second, service.official(admin) as third:
        job = await first.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="x")
        assert [each.id async for each in second.fine_tuning.jobs.list()] == []
        jobs = second.fine_tuning.jobs
        for reading in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(openai.NotFoundError):
                await reading(job.id)
        with pytest.raises(openai.BadRequestError, match="there is no file"):
            await jobs.create(model=BASE, training_file=file)
        assert (await third.fine_tuning.jobs.retrieve(job.id)).id == job.id
        assert [each.id async for each in third.fine_tuning.jobs.list()] == [job.id]
        own = service.add_file(owner=bob.key.id)
        other = await jobs.create(model=BASE, training_file=own, suffix="x")
    assert find_job(store, job.id, None).name == f"ft-{alice.key.id}-x"
    assert find_job(store, other.id, None).name == f"ft-{bob.key.id}-x"


@pytest.mark.slow
async def test_only_the_owner_of_a_fine_tuned_model_can_train_it_further(
    service: FineTuningService, store: Store
) -> None:
    alice, bob = service.key(Scope.JOBS), service.key(Scope.JOBS)
    operator = service.key(Scope.JOBS, models=frozenset({f"ft-{alice.key.id}-x", "tickets"}))
    files = {key.key.id: service.add_file(owner=key.key.id) for key in (alice, bob, operator)}
    async with service.official(alice) as first, service.official(bob) as second, service.official(operator) as third:
        job = await first.fine_tuning.jobs.create(model=BASE, training_file=files[alice.key.id], suffix="x")
        change_job(store, job.id, status="succeeded", fine_tuned_model="ft:small:org:x:1", number=1)
        name = f"ft-{alice.key.id}-x@1"
        for model in ("ft:small:org:x:1", name):
            further = await first.fine_tuning.jobs.create(model=model, training_file=files[alice.key.id])
            written = yaml.safe_load(find_job(store, further.id, None).recipe)
            assert (written["base"], written["name"]) == (name, f"ft-{alice.key.id}-x")
            with pytest.raises(openai.BadRequestError, match="cannot be fine-tuned here"):
                await second.fine_tuning.jobs.create(model=model, training_file=files[bob.key.id])
        for model in (name, "tickets@2"):  # listed for this key
            await third.fine_tuning.jobs.create(model=model, training_file=files[operator.key.id])
        with pytest.raises(openai.BadRequestError):
            await third.fine_tuning.jobs.create(model="other@1", training_file=files[operator.key.id])


@pytest.mark.slow
async def test_job_rejection_tells_the_client_not_to_retry_when_the_key_has_too_many_open_jobs(
    socket_folder: Path, store: Store, base: Path, check: FakeCheck
) -> None:
    service = FineTuningService(socket_folder, store=store, base=base, max_jobs=1)
    async with service.run(), service.official(max_retries=2) as client:
        file = service.add_file()
        await client.fine_tuning.jobs.create(model=BASE, training_file=file)
        with pytest.raises(openai.RateLimitError, match="this key has 1 unfinished jobs") as caught:
            await client.fine_tuning.jobs.create(model=BASE, training_file=file, seed=1)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(check.recipes) == 1


async def test_fine_tuning_api_is_disabled_when_no_bases_are_configured(socket_folder: Path, store: Store) -> None:
    service = FineTuningService(socket_folder, store=store, base=None)
    async with service.run(), service.official() as client:
        for answer in (
            client.fine_tuning.jobs.create(model=BASE, training_file="file-1"),
            client.fine_tuning.jobs.list(),
            client.fine_tuning.jobs.cancel("ftjob-1"),
        ):
            with pytest.raises(openai.PermissionDeniedError, match=r"fine_tuning\.bases") as caught:
                await answer
            assert caught.value.code == "fine_tuning_disabled"


async def test_job_creation_with_an_oversized_body_is_rejected(service: FineTuningService, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        await client.fine_tuning.jobs.create(model=BASE, training_file="x" * 70_000)
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")


@pytest.mark.slow
async def test_job_creation_and_cancellation_are_recorded_in_the_audit_log(
    service: FineTuningService, store: Store
) -> None:
    key = service.key(Scope.JOBS)
    async with service.official(key) as client:
        file = service.add_file(owner=key.key.id)
        job = await client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="x")
        for _ in range(2):
            await client.fine_tuning.jobs.cancel(job.id)
    events = [event for event in audit.read_events(store, newest=10) if event.subject == job.id]
    assert [(event.action, event.actor) for event in events] == [
        ("job.create", f"key:{key.key.id}"),
        ("job.cancel", f"key:{key.key.id}"),
    ]
    assert events[0].details == {"model": BASE, "training_file": file, "name": f"ft-{key.key.id}-x"}
