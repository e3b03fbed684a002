"""Names under which the checkpoints of jobs are registered: `ft-ckpt-ID@STEP`, with the job's id.

Checkpoints are thus not versions of the job's model, so they cannot be promoted, and are never its newest version. A
model trained by a job is named `ft-KEY-SUFFIX`, and no key has the id `ckpt`, so the two kinds of names cannot collide.
"""

from svc.version import VersionId

_JOB, _REGISTERED = "ftjob-", "ft-ckpt-"


def checkpoint_version(job: str, step: int) -> VersionId:
    """Return the version under which a job's checkpoint at a step is registered."""
    return VersionId(_REGISTERED + job.removeprefix(_JOB), step)


def job_of_checkpoints(name: str) -> str | None:
    """Return the id of the job whose checkpoints are registered under a name, or None for other names."""
    return _JOB + name.removeprefix(_REGISTERED) if name.startswith(_REGISTERED) else None
