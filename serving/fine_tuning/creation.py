"""Creates fine-tuning jobs. Jobs that cannot succeed are rejected before any training.

    request ──▶ base, files ──▶ recipe ──▶ `svc estimate` ──▶ job: queued
                                                │
                a file is still being checked ──┴──▶ job: validating_files ──▶ checked ──▶ job: queued or failed

Identical requests, even concurrent ones, create only one job.
"""

import asyncio
import hashlib
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine as Store
from sqlalchemy.exc import SQLAlchemyError

from serving.admission.errors import OverloadedError
from serving.files.client_files import ClientFiles
from serving.files.rows import ClientFile, FileStatus, Purpose, find_file
from serving.files.shared_contents import ContentDamagedError, ContentMissingError, ContentStoreError
from serving.fine_tuning.recipe import (
    BASE_KEY,
    Sources,
    check_conflicts,
    check_recipe_keys,
    complete,
    file_keys,
    make_recipe,
    recipe_text,
    recipe_with_data,
    registered_name,
    suffix_of,
)
from serving.fine_tuning.request import JobRequest
from serving.fine_tuning.request_rows import (
    JobError,
    create_job,
    fail_checked,
    find_repeated,
    find_trained,
    queue_checked,
    read_checking,
)
from serving.fine_tuning.rows import Job
from serving.fine_tuning.training_check import CheckFailedError, CheckTimeoutError, TrainingCheck, check_training
from serving.http.page import EntryNotFoundError
from serving.models.fine_tuned_rows import owners_of
from serving.protocols.error_code import ErrorCode, answered_with
from serving.protocols.request import InvalidRequestError
from serving.store_changes.changes import Changes
from svc.errors import BaseModelError, DataError, NotFoundError, RecipeError, SvcError
from svc.files.yaml_text import parse_yaml
from svc.identity.actor import Actor
from svc.identity.principal import Principal
from svc.settings.client_apis import TrainingPlace
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry
from svc.store.database import is_sqlite
from svc.store.outage_log import log_store_error
from svc.store.statuses import JobStatus
from svc.version import VersionId

log = logging.getLogger(__name__)

CheckTraining = Callable[..., Awaitable[TrainingCheck]]
"""Type of `serving.fine_tuning.training_check.check_training`."""
_CHECK_S = 60.0
"""Maximum time that a request waits for its recipe to be checked, in seconds. A longer check continues in the
background."""
_LONG_CHECK_S = 3600.0
_POLL_S = 1.0
_FETCH_AGAIN_S = 60.0
_TAKE_OVER_AFTER = timedelta(minutes=1)
_MAX_CHECKS = 2
_MAX_WAITING = 64
_MODEL = re.compile(r"[A-Za-z0-9:._/@-]{1,256}")  # PostgreSQL rejects some other characters
_FAILURES = {"training_file": "invalid_training_file", "validation_file": "invalid_validation_file"}
_QUEUED = "Files validated, moving job to queued state"


@answered_with(403, ErrorCode.FINE_TUNING_DISABLED)
class FineTuningDisabledError(SvcError):
    """Raised when a client uses the fine-tuning API of a server that has no base models configured."""


@dataclass(frozen=True, slots=True)
class Client:
    """The client that creates a job.

    Attributes:
        owner: owner of the new job.
        visible_owner: the only owner whose files and models the client may use, or None for all.
        principal: the client's key, or None if no key was needed.
        actor: who creates the job, for the audit log.
    """

    owner: str
    visible_owner: str | None
    principal: Principal | None
    actor: Actor


@dataclass(frozen=True, slots=True)
class _Plan:
    """A checked request and its recipe.

    Attributes:
        recipe: see `serving.fine_tuning.recipe.make_recipe`.
        files: ids of the files, keyed by the recipe keys (in the `data` section) that hold the files' paths.
        files_checked: whether all files have been checked.
    """

    request: JobRequest
    name: str
    recipe: dict[str, Any]
    files: Mapping[str, str]
    files_checked: bool


class UnusableDataError(InvalidRequestError):
    """Raised when the examples in a client's files cannot be trained on."""


class JobCreation:
    """Creates fine-tuning jobs.

    Args:
        changes: notifications about changes in the store, which `run` waits for while no job's files are being checked.
        check: function that checks a recipe.
    """

    def __init__(
        self,
        store: Store,
        files: ClientFiles,
        settings: Settings,
        changes: Changes,
        check: CheckTraining = check_training,
    ) -> None:
        self._store = store
        self._files = files
        self._settings = settings
        self._changes = changes
        self._check = check
        self._checks = asyncio.Semaphore(_MAX_CHECKS)
        self._decisions = asyncio.Semaphore(_MAX_CHECKS)  # so that no client waits for an hour
        self._running: dict[str, asyncio.Task[Job]] = {}

    async def create(self, request: JobRequest, client: Client) -> Job:
        """Return a new job for a request, or the job that an identical request created.

        Raises:
            InvalidRequestError: the job cannot succeed, or the client may not use the files or models that it names.
            TooManyJobsError: the owner has too many unfinished jobs.
            OverloadedError: too many jobs are being created.
        """
        fingerprint = hashlib.sha256(f"{client.owner}\n{request.json_text()}".encode()).hexdigest()
        task = self._running.get(fingerprint)
        if task is None:
            if len(self._running) >= _MAX_WAITING:
                raise OverloadedError(
                    f"{_MAX_WAITING} jobs are already being created", todo="send the request again later"
                )
            task = asyncio.create_task(self._create(request, client, fingerprint))
            self._running[fingerprint] = task
            task.add_done_callback(lambda ended: self._ended(fingerprint, ended))
        return await asyncio.shield(task)  # other equal requests may wait for it

    def _ended(self, fingerprint: str, task: asyncio.Task[Job]) -> None:
        del self._running[fingerprint]
        if not task.cancelled():
            task.exception()  # all clients may have disconnected; asyncio would warn about the unread error

    async def run(self) -> None:
        """Until cancelled, queue or fail each job once its files have been checked. Several servers may run this
        concurrently.
        """
        deciding: dict[str, asyncio.Task[None]] = {}
        while True:
            count = self._changes.count
            try:
                jobs = await asyncio.to_thread(read_checking, self._store)
            except SQLAlchemyError:
                log_store_error(log, "could not read which fine-tuning jobs are waiting for a check of their files")
                await asyncio.sleep(_POLL_S)
                continue
            for job in jobs:
                if job.id not in deciding:
                    deciding[job.id] = asyncio.create_task(self._decide(job))
                    deciding[job.id].add_done_callback(partial(_remove, deciding, job.id))
            if jobs:
                await asyncio.sleep(_POLL_S)
            else:
                await self._changes.wait(count, _POLL_S)

    async def _decide(self, job: Job) -> None:
        try:
            async with self._decisions:
                await decide_job(self._store, self._files, self._settings, job, self._check)
        except SQLAlchemyError:
            log_store_error(log, "could not record the result of checking job %s; checking it again", job.id)
        except (ContentMissingError, ContentStoreError, OSError) as error:
            log.warning("could not check job %s; retrying later: %s", job.id, error)
            await asyncio.sleep(_FETCH_AGAIN_S)

    async def _create(self, request: JobRequest, client: Client, fingerprint: str) -> Job:
        most = self._settings.fine_tuning.max_jobs
        repeated = await asyncio.to_thread(find_repeated, self._store, fingerprint, client.owner, max_jobs=most)
        if repeated is not None:
            return repeated
        plan = await asyncio.to_thread(self._plan, request, client)
        check = await self._checked(plan)
        recipe, training_s = plan.recipe, None
        if check is not None:
            request, recipe, training_s = complete(request, recipe, check)
        id, queued = f"ftjob-{secrets.token_hex(12)}", check is not None
        job = Job(
            id=id,
            owner=client.owner,
            fingerprint=fingerprint,
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            request=request.json_text(),
            recipe=recipe_text(recipe),
            name=plan.name,
            status=JobStatus.QUEUED if queued else JobStatus.VALIDATING_FILES,
            created_at=datetime.now(UTC),
        )
        details = {"model": job.model, "training_file": job.training_file, "name": job.name}
        try:
            return await asyncio.to_thread(
                create_job,
                self._store,
                job,
                AuditEntry(Action.CREATE_JOB, id, client.actor, details=details),
                max_jobs=most,
                training_s=training_s,
                events=[
                    f"Created fine-tuning job: {id}",
                    _QUEUED if queued else f"Validating training file: {job.training_file}",
                ],
            )
        except EntryNotFoundError as error:  # the file has been deleted since
            raise _invalid(error.param, error.wrong, error.expected) from error

    def _plan(self, request: JobRequest, client: Client) -> _Plan:
        """Look up the files and the base that a request names, and make its recipe."""
        keys = request.recipe or {}
        check_recipe_keys(keys)
        check_conflicts(request)
        if request.objective == "reinforcement":
            raise _invalid("method", "the method 'reinforcement' is not supported", "supervised or dpo")
        if request.objective == "dpo" and self._settings.fine_tuning.place is TrainingPlace.RAY:
            raise _invalid(
                "method", "this server trains on a Ray cluster, where preference tuning is not supported", "supervised"
            )
        if request.integrations and not self._settings.fine_tuning.wandb:
            raise _invalid(
                "integrations",
                "this server does not report to Weights & Biases; training runs are recorded in MLflow",
                "no 'integrations', or a server with the setting `fine_tuning.wandb`",
            )
        base, suffix = self._base(request.model, client, "model")
        if BASE_KEY in keys:
            base, _ = self._base(keys[BASE_KEY], client, f"recipe.{BASE_KEY}")
        given = {"training_file": request.training_file, "validation_file": request.validation_file}
        files = {param: _usable_file(self._store, id, client, param) for param, id in given.items() if id is not None}
        paths = {param: self._files.path(file.id) for param, file in files.items()}
        name = registered_name(client.owner, request.suffix or suffix)
        recipe = make_recipe(request, name, Sources(base, paths["training_file"], paths.get("validation_file")))
        ids = file_keys(request.training_file, request.validation_file)
        return _Plan(request, name, recipe, ids, all(file.status is FileStatus.PROCESSED for file in files.values()))

    def _base(self, model: str, client: Client, param: str) -> tuple[str, str]:
        """Return the base that a client's model name refers to, in the form used in recipes, and the default suffix for
        models trained from this base.
        """
        bases = self._settings.fine_tuning.bases
        if model in bases:
            return _existing(bases[model], model, param), model
        version = _find_version(self._store, model, client)
        if version is None:
            raise _unknown_base(model, param, bases)
        return str(version), suffix_of(version.name, client.owner)

    async def _checked(self, plan: _Plan) -> TrainingCheck | None:
        """Return the result of checking a plan. Return None if the job cannot be queued or rejected yet, because a
        file has not been checked, its contents cannot be fetched now, or the check takes too long.

        Raises:
            ContentDamagedError: the contents of a file were truncated or altered.
        """
        try:
            async with asyncio.timeout(_CHECK_S):
                recipe = recipe_with_data(plan.recipe, await _contents(self._files, plan.files))
        except ContentDamagedError:
            raise
        except (ContentMissingError, ContentStoreError, OSError):  # TimeoutError is an OSError
            return None
        try:
            async with self._checks:
                check = await _run_check(self._check, plan.request, recipe, self._settings, _CHECK_S)
        except CheckTimeoutError:
            return None
        except UnusableDataError:
            if plan.files_checked:
                raise
            return None
        return check if plan.files_checked else None


async def decide_job(
    store: Store, files: ClientFiles, settings: Settings, job: Job, check: CheckTraining = check_training
) -> None:
    """Move a job from `validating_files` to the queue, or fail it, once its files have been checked.

    If this server does not have the files' contents, it leaves the job to the other servers, if there are any. If there
    is an object store, it does so only until the job is a minute old.

    Raises:
        ContentMissingError, ContentStoreError: the contents of the files cannot be fetched now.
    """
    try:
        request = JobRequest.model_validate_json(job.request)
        if not await asyncio.to_thread(_files_checked, store, job):
            return
        ids = file_keys(job.training_file, job.validation_file)
        if not await asyncio.to_thread(_is_own_turn, store, files, job, ids.values()):
            return
        recipe = recipe_with_data(parse_yaml(job.recipe), await _contents(files, ids))
        result = await _run_check(check, request, recipe, settings, _LONG_CHECK_S)
        request, recipe, training_s = complete(request, recipe, result)
        text = recipe_text(recipe)
    except (InvalidRequestError, CheckTimeoutError) as error:
        param = getattr(error, "param", None)
        failure = JobError(_FAILURES.get(param or "", "invalid_request"), _sentence(error), param)
        await asyncio.to_thread(fail_checked, store, job.id, failure)
    except ContentDamagedError as error:
        await asyncio.to_thread(fail_checked, store, job.id, JobError("server_error", error.wrong))
    except CheckFailedError:
        log.exception("could not check job %s", job.id)
        failure = JobError("server_error", "the job could not be checked; the server's log says why")
        await asyncio.to_thread(fail_checked, store, job.id, failure)
    else:
        values = partial(queue_checked, request=request.json_text(), recipe=text, training_s=training_s, event=_QUEUED)
        await asyncio.to_thread(values, store, job.id)


def _is_own_turn(store: Store, files: ClientFiles, job: Job, ids: Iterable[str]) -> bool:
    """Return whether this server should queue or fail a job. It should if it has the files' contents, or if no other
    server has queued or failed the job in time.

    Raises:
        InvalidRequestError: the contents of a file have been lost.
    """
    missing = next((id for id in ids if files.find(id) is None), None)
    if missing is None:
        return True
    if files.are_shared:
        return job.created_at < datetime.now(UTC) - _TAKE_OVER_AFTER
    if is_sqlite(store):  # there is no other server
        param = "training_file" if missing == job.training_file else "validation_file"
        raise _invalid(param, f"the content of file {missing} has been lost", "a file whose content is available")
    return False


async def _contents(files: ClientFiles, ids: Mapping[str, str]) -> dict[str, str]:
    """Return the path to the contents of each of a job's files, keyed by recipe key."""
    return {key: str(await files.content(id)) for key, id in ids.items()}


def _remove(tasks: dict[str, asyncio.Task[None]], id: str, task: asyncio.Task[None]) -> None:
    del tasks[id]


def require_enabled(settings: Settings) -> None:
    """Check that the fine-tuning API is enabled.

    Raises:
        FineTuningDisabledError: the API is disabled.
    """
    if not settings.fine_tuning.bases:
        raise FineTuningDisabledError(
            "fine-tuning over HTTP is disabled on this server",
            expected="the `fine_tuning.bases` setting, which names the bases that clients may fine-tune",
            todo="ask the operator to set it, for example `fine_tuning: {bases: {gpt-4o-mini: ./models/NAME}}`",
        )


def _unknown_base(model: str, param: str, bases: Iterable[str]) -> InvalidRequestError:
    return _invalid(
        param,
        f"model {model[:100]!r} cannot be fine-tuned here",
        f"one of {', '.join(bases)}, or a fine-tuned model of this key that has merged weights",
    )


def _existing(base: str, model: str, param: str) -> str:
    """Return the base unchanged. If it is an absolute path, first check that the path exists here and has weights."""
    path = Path(base)
    if path.is_absolute() and not (path.is_file() or any(path.glob("*.safetensors"))):
        log.error("base %s of model %s, from `fine_tuning.bases`, has no weights", base, model)
        raise _invalid(
            param, f"the base of {model!r} is missing on this server", "a base that exists; ask the operator"
        )
    return base


def _find_version(store: Store, model: str, client: Client) -> VersionId | None:
    """Return the version that a client names, or None if there is no such version that the client may use."""
    if model.startswith("ft:"):
        return find_trained(store, model, client.visible_owner) if _MODEL.fullmatch(model) else None
    try:
        version = VersionId.parse(model)
    except NotFoundError:
        return None
    listed = client.principal is not None and client.principal.models is not None
    may_ask = client.principal is None or client.principal.may_ask(model)
    owners = owners_of(store, version.name)
    own = client.visible_owner is None or client.visible_owner in owners
    # Models of jobs belong to the jobs' owners, unless the operator has listed them for a key.
    return version if own or (may_ask and (listed or not owners)) else None


def _usable_file(store: Store, id: str, client: Client, param: str) -> ClientFile:
    try:
        file = find_file(store, id, client.visible_owner)
    except EntryNotFoundError as error:
        raise _invalid(param, error.wrong, error.expected) from error
    if file.purpose is not Purpose.FINE_TUNE:
        raise _invalid(param, f"file {id} has purpose {file.purpose}", f"purpose {Purpose.FINE_TUNE}")
    _require_valid(file, param)
    return file


def _files_checked(store: Store, job: Job) -> bool:
    """Return whether all files of a job have been checked."""
    checked = True
    for param, id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
        if id is not None:
            try:
                file = find_file(store, id, None)
            except EntryNotFoundError as error:
                raise _invalid(param, error.wrong, "a file that is kept until the job has ended") from error
            _require_valid(file, param)
            checked = checked and file.status is FileStatus.PROCESSED
    return checked


def _require_valid(file: ClientFile, param: str) -> None:
    if file.status is FileStatus.ERROR:
        details = (file.status_details or "it cannot be read")[:1000]
        raise _invalid(param, f"file {file.id} is not valid: {details}", "")


async def _run_check(
    check: CheckTraining, request: JobRequest, recipe: dict[str, Any], settings: Settings, timeout_s: float
) -> TrainingCheck:
    """Check a recipe. Error messages are shown to clients, so they contain no paths on this machine.

    Raises:
        UnusableDataError, InvalidRequestError: the recipe cannot be used for training.
        CheckTimeoutError: the check took too long.
    """
    try:
        result = await check(recipe_text(recipe), settings, timeout_s=timeout_s)
    except DataError as error:
        train, heldout = recipe["data"]["train"], recipe["data"].get("heldout", "")
        in_heldout = heldout and heldout in error.wrong and train not in error.wrong
        wrong = error.wrong
        for path in filter(None, (train, heldout)):
            wrong = wrong.replace(f"{Path(path).parent}/", "")
        param = "validation_file" if in_heldout else "training_file"
        raise UnusableDataError(wrong, param=param, expected=error.expected) from error
    except RecipeError as error:
        raise _invalid("recipe" if request.recipe else "method", error.wrong, error.expected) from error
    except NotFoundError as error:  # as for a model of another key, whose existence is hidden
        base = (request.recipe or {}).get(BASE_KEY)
        model, param = (request.model, "model") if base is None else (base, f"recipe.{BASE_KEY}")
        raise _unknown_base(model, param, settings.fine_tuning.bases) from error
    except BaseModelError as error:
        log.error("base %s cannot be fine-tuned: %s", recipe["base"], error)
        raise _invalid(
            "model", f"the base of {request.model!r} cannot be fine-tuned on this server", "another model"
        ) from error
    if result.refused and settings.fine_tuning.place is TrainingPlace.HERE:
        raise _invalid(
            "model",
            f"the job does not fit into this server's memory: {result.refused}",
            "a smaller base, or `recipe: {method: qlora}`",
        )
    return result


def _invalid(param: str, wrong: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(wrong, param=param, expected=expected)


def _sentence(error: SvcError) -> str:
    return f"{error.wrong}; expected {error.expected}" if error.expected else error.wrong
