"""Names under which the checkpoints of jobs are registered: `ft-ckpt-ID@STEP`, with the job's id.

So they are no versions of the job's model, neither its newest one nor one to promote. No key has the id `ckpt`, so the
name is never that of a model.
"""

from svc.version import VersionId

_JOB, _REGISTERED = "ftjob-", "ft-ckpt-"


def checkpoint_version(job: str, step: int) -> VersionId:
    """Return the version under which a job's checkpoint at a step is registered."""
    return VersionId(_REGISTERED + job.removeprefix(_JOB), step)


def job_of_checkpoints(name: str) -> str | None:
    """Return the id of the job whose checkpoints are registered under a name, or None for other names."""
    return _JOB + name.removeprefix(_REGISTERED) if name.startswith(_REGISTERED) else None
