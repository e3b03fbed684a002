"""`svc jobs` lists, follows and changes fine-tuning jobs, on this machine or with `svc --server`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from svc.errors import RefusedError, ServerNotRunningError, TrainingError
from svc.invocation import confirm, json_option, print_json, remote_of, settings_of, yes_option

if TYPE_CHECKING:
    from rich.progress import Progress

    from serving.fine_tuning.jobs_client import Jobs
    from serving.fine_tuning.rows import Wanted

_POLL_S = 1.0
_RESTART_S = 60.0
"""Maximum time in seconds that a server may be unresponsive while a job is followed, for example during a restart."""
_FIELDS = {
    "id": "job",
    "status": "status",
    "model": "model",
    "fine_tuned_model": "fine-tuned model",
    "training_file": "training file",
    "validation_file": "validation file",
    "trained_tokens": "trained tokens",
}


@click.group()
def jobs() -> None:
    """List, follow, cancel, pause and resume fine-tuning jobs."""


@jobs.command("list")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Maximum number of jobs to list."
)
@json_option
@click.pass_context
def list_jobs(ctx: click.Context, limit: int, as_json: bool) -> None:
    """List fine-tuning jobs, newest first."""
    from svc.terminal import print_table

    source = _jobs_of(ctx)
    rows = source.recent(limit)
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("no fine-tuning jobs yet; clients create them, see docs/fine-tuning-api.md")
        return
    headers = ("job", "status", "model", "created", "ended", "fine-tuned model")
    moments = [(_minute(row["created_at"]), _end(source, row)) for row in rows]
    print_table(
        headers,
        [
            (row["id"], row["status"], row["model"], created, ended, row["fine_tuned_model"])
            for row, (created, ended) in zip(rows, moments, strict=True)
        ],
    )


@jobs.command()
@click.argument("job")
@json_option
@click.pass_context
def show(ctx: click.Context, job: str, as_json: bool) -> None:
    """Show JOB and its events."""
    source = _jobs_of(ctx)
    found = source.find(job)
    events = list(source.events(job, None))
    if as_json:
        print_json({**found, "events": events})
        return
    lines = {title: found[name] for name, title in _FIELDS.items()}
    lines |= {f"hyperparameter {name}": value for name, value in found["hyperparameters"].items()}
    lines |= {"created": _minute(found["created_at"]), "ended": _end(source, found)}
    if found["error"]:
        lines["error"] = _plain(found["error"]["message"])
    width = max(map(len, lines))
    for title, value in lines.items():
        if value not in (None, ""):
            click.echo(f"{title:<{width}}  {value}")
    click.echo()
    for event in events:
        click.echo(f"{_minute(event['created_at'])}  {_plain(event['message'])}")


@jobs.command()
@click.argument("job")
@json_option
@click.pass_context
def follow(ctx: click.Context, job: str, as_json: bool) -> None:
    """Show the loss, progress and remaining time of JOB until it ends. Ctrl-C stops only this command.

    With --json, each event is a line of JSON, and the last line is the job.
    """
    source = _jobs_of(ctx)
    with _display() as progress:
        for item in _watch(source, job):
            if as_json:
                click.echo(json.dumps(item, ensure_ascii=False))
            elif item["object"] == "fine_tuning.job.event":
                _show_event(progress, item)
            else:
                _show_left(progress, item)
            last = item
    if last["status"] == "failed":
        raise TrainingError(f"job {job} failed: {_plain(last['error']['message'])}")
    if last["status"] == "cancelled":
        raise RefusedError(f"job {job} was cancelled")
    if not as_json:
        click.echo(f"fine-tuned model: {last['fine_tuned_model']}")


@jobs.command()
@click.argument("job")
@yes_option
@json_option
@click.pass_context
def cancel(ctx: click.Context, job: str, yes: bool, as_json: bool) -> None:
    """Cancel JOB. Its training is stopped within seconds, and cannot be resumed."""
    from serving.fine_tuning.rows import Wanted

    source = _jobs_of(ctx)
    confirm(f"{source.find(job)['id']} will be cancelled, and cannot be resumed. Continue?", yes=yes, as_json=as_json)
    _change(source, job, Wanted.CANCEL, as_json=as_json)


@jobs.command()
@click.argument("job")
@json_option
@click.pass_context
def pause(ctx: click.Context, job: str, as_json: bool) -> None:
    """Pause JOB. Its training writes a checkpoint, and frees the machine for other jobs."""
    from serving.fine_tuning.rows import Wanted

    _change(_jobs_of(ctx), job, Wanted.PAUSE, as_json=as_json)


@jobs.command()
@click.argument("job")
@json_option
@click.pass_context
def resume(ctx: click.Context, job: str, as_json: bool) -> None:
    """Resume a paused JOB from its last checkpoint."""
    from serving.fine_tuning.rows import Wanted

    _change(_jobs_of(ctx), job, Wanted.RUN, as_json=as_json)


def _change(source: "Jobs", id: str, wanted: "Wanted", *, as_json: bool) -> None:
    from serving.fine_tuning.rows import Wanted
    from svc.store.statuses import JobStatus

    job = source.change(id, wanted)
    if as_json:
        print_json(job)
        return
    running = job["status"] == JobStatus.RUNNING
    match wanted:
        case Wanted.CANCEL:
            click.echo(f"{id} is being cancelled" if running else f"{id} is cancelled")
        case Wanted.PAUSE:
            click.echo(f"{id} is being paused: its training writes a checkpoint" if running else f"{id} is paused")
        case Wanted.RUN:
            click.echo(f"{id} is {job['status']}")


def _watch(source: "Jobs", id: str) -> Iterator[dict[str, Any]]:
    """Yield a job's events and, after each poll, the job itself, until it has ended.

    Raises:
        ServerNotRunningError: the server has not responded for a minute.
    """
    from serving.fine_tuning.jobs_client import has_ended

    source.find(id)  # an error of the first request is shown immediately
    after, seen_at = None, time.monotonic()
    while True:
        try:
            job = source.find(id)  # before its events, so that the last ones are not missed
            events = list(source.events(id, after))
        except ServerNotRunningError:
            if time.monotonic() - seen_at > _RESTART_S:
                raise
        else:
            seen_at = time.monotonic()
            yield from events
            after = events[-1]["id"] if events else after
            ended = has_ended(job)
            if ended or events:
                yield job
            if ended:
                return
        time.sleep(_POLL_S)


@contextmanager
def _display() -> Iterator["Progress"]:
    """Yield a progress bar, which is shown only on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from svc.terminal import console

    loss, left = TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[left]}")
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), loss, left)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        progress.add_task("", total=None, visible=False, loss="", left="")
        yield progress


def _show_event(progress: "Progress", event: dict[str, Any]) -> None:
    (task,) = progress.task_ids
    data = event["data"]
    if progress.disable or event["type"] != "metrics":
        click.echo(f"{_minute(event['created_at'])}  {_plain(event['message'])}")
    else:
        loss = event["message"].partition(": ")[2]
        progress.update(task, completed=data["step"], total=data.get("total_steps"), loss=loss, visible=True)


def _show_left(progress: "Progress", job: dict[str, Any]) -> None:
    (task,) = progress.task_ids
    progress.update(task, left=_left(job))


def _end(source: "Jobs", job: dict[str, Any]) -> str:
    """Return text saying when a job ended, how much time is left or, after its last step, which stage it is in."""
    from serving.fine_tuning.rows import STAGE_BEGUN
    from svc.store.statuses import JobStatus

    end = _minute(job["finished_at"]) or _left(job)
    if end or job["status"] != JobStatus.RUNNING:
        return end
    messages = (event["message"] for event in source.newest_events(job["id"]))
    stage = next((_plain(text.removeprefix(STAGE_BEGUN)) for text in messages if text.startswith(STAGE_BEGUN)), None)
    return f"stage: {stage}" if stage else ""


def _left(job: dict[str, Any]) -> str:
    """Return the remaining time of a job as text; empty if it is unknown or the job has ended."""
    left = (job["estimated_finish"] or 0) - int(datetime.now(UTC).timestamp())
    if left <= 0:
        return ""
    minutes, seconds = divmod(left, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"in {hours} h {minutes} min"
    return f"in {minutes} min" if minutes else f"in {seconds} s"


def _jobs_of(ctx: click.Context) -> "Jobs":
    from serving.fine_tuning.jobs_client import LocalJobs, RemoteJobs
    from svc.store.database import open_store

    if remote := remote_of(ctx):
        return RemoteJobs(remote)
    settings = settings_of(ctx)
    return LocalJobs(open_store(settings), settings.fine_tuning.organization)


def _plain(text: str) -> str:
    """Return the text with unprintable characters replaced by `?`.

    A message may quote a client's file, which may contain terminal control characters.
    """
    return "".join(each if each.isprintable() else "?" for each in text)


def _minute(seconds: int | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M") if seconds else ""
