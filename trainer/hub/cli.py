"""The `svc push` command, which publishes a version on the Hugging Face Hub."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svc.invocation import confirm, json_option, print_json, reason_option, settings_of, yes_option
from svc.terminal import console, print_table
from svc.version import Format, VersionId

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from svc.settings.settings import Settings
    from trainer.hub.upload import Destination, UploadFile

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@click.command()
@click.argument("version")
@click.argument("repo", metavar="ORG/NAME")
@click.option(
    "--format",
    "kind",
    type=click.Choice([format.value for format in Format]),
    default=Format.MERGED.value,
    show_default=True,
    help="Format to upload.",
)
@click.option("--public", is_flag=True, help="Create a repository that everyone can read.  [default: private]")
@click.option(
    "--replace",
    is_flag=True,
    help="Replace the content of an existing repository; the old content stays in its history.",
)
@click.option("--dry-run", is_flag=True, help="Write the model card and list the files, without using the network.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --dry-run: file to write the model card to.  [default: NAME-N-card.md]",
)
@yes_option
@reason_option
@json_option
@click.pass_context
def push(
    ctx: click.Context,
    version: str,
    repo: str,
    kind: str,
    public: bool,
    replace: bool,
    dry_run: bool,
    output: Path | None,
    yes: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    """Upload VERSION to the repository ORG/NAME on the Hugging Face Hub, with a model card.

    Nothing is sent until you have confirmed the files, their sizes and who can read the repository.
    """
    if not _REPO.fullmatch(repo):
        raise click.BadParameter(f"{repo!r} is not a repository; expected ORG/NAME", param_hint="ORG/NAME")
    if output and not dry_run:
        raise click.UsageError("--output requires --dry-run")
    from svc.registry.registry import Registry
    from trainer.hub.upload import check_destination, connect, files_to_upload

    settings, format = settings_of(ctx), Format(kind)
    registry = Registry.of(settings)
    version_id = registry.resolve(version)
    files = files_to_upload(registry, registry.manifest(version_id), format, repo)
    listed = [{"path": file.path, "bytes": file.bytes} for file in files]
    result: dict[str, object] = {"version": str(version_id), "format": kind, "repo": repo, "public": public}
    if dry_run:
        _show(files, f"{version_id} ({kind})", repo, public=public)
        card = _write_card(files, output or Path(f"{version_id.name}-{version_id.number}-card.md"))
        console.print(f"wrote the model card to {card}; nothing was uploaded", markup=False, soft_wrap=True)
        result |= {"files": listed, "card": str(card)}
    else:
        api = connect()
        destination = check_destination(api, repo, version_id, public=public, replace=replace)
        _show(files, f"{version_id} ({kind})", f"{api.endpoint}/{repo}", public=public)
        if destination.files:
            console.print(f"the {len(destination.files)} existing files of {repo} will be replaced", markup=False)
        confirm(f"Upload {version_id} to {repo}?", yes=yes, as_json=as_json)
        result |= {"files": listed} | _upload(settings, api, destination, files, version_id, reason)
    if as_json:
        print_json(result)


def _show(files: "list[UploadFile]", what: str, where: str, *, public: bool) -> None:
    """Print the files to be uploaded, their destination, and who will be able to read them."""
    print_table(("file", "bytes"), ([file.path, f"{file.bytes:,}"] for file in files), to=console)
    size = sum(file.bytes for file in files) / 1e6
    readers = "public (everyone can read it)" if public else "private"
    console.print(
        f"{what}: {len(files)} files, {size:,.1f} MB; destination: {where}, {readers}", markup=False, soft_wrap=True
    )


def _write_card(files: "list[UploadFile]", output: Path) -> Path:
    content = files[0].content
    try:
        output.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    except OSError as error:
        raise click.UsageError(f"cannot write {output}: {error.strerror}") from error
    return output.absolute()


def _upload(
    settings: "Settings",
    api: "HfApi",
    destination: "Destination",
    files: "list[UploadFile]",
    version: VersionId,
    reason: str | None,
) -> dict[str, object]:
    """Record the upload in the audit log, carry it out, and return the commit, its URL and the tag."""
    from svc.identity.actor import Actor
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_store
    from trainer.hub.upload import upload

    details = {"repo": destination.repo, "server": api.endpoint, "public": destination.public}
    record_event(open_store(settings), AuditEntry(Action.PUSH, str(version), Actor.local(), reason, details))
    commit, url = upload(api, destination, files, version)
    console.print(f"uploaded {version}: {url}, tag {destination.tag}", markup=False, soft_wrap=True)
    return {"commit": commit, "url": url, "tag": destination.tag}
