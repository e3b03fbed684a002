"""Settings of the database and the object store."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from svc.settings.section import AbsolutePath, Section


def _store_url(secret: SecretStr) -> SecretStr:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        text = secret.get_secret_value()
        url = make_url(text)
        valid = url.drivername in ("postgresql", "postgresql+psycopg") and bool(url.database)
        valid = valid and not {"password", "sslpassword"} & url.query.keys()  # SQLAlchemy would not hide them
        # After an unescaped @, the rest of a password would be part of the host, which errors name.
        valid = valid and text.count("@") <= 1 and "@" not in str(url.query.get("host"))
    except (ArgumentError, ValueError):  # their messages may quote the password
        valid = False
    if not valid:
        raise ValueError(
            "must be the URL of a PostgreSQL database, such as postgresql+psycopg://user@host:5432/database; put the "
            "password, percent-encoded, after the user name, not in a query parameter"
        )
    return secret


class StoreSettings(Section):
    """Settings of the store, which contains desired versions, keys, the audit log, requests and feedback.

    By default, it is an SQLite database in the home folder. See docs/scale.md for PostgreSQL.
    """

    url: Annotated[SecretStr, AfterValidator(_store_url)] | None = None
    """URL of a PostgreSQL database, such as `postgresql+psycopg://user@host:5432/database`; default: SQLite, `svc.db`
    in `home`."""
    password_file: AbsolutePath | None = None
    """File with the password for `store.url`, unless the URL contains it."""


def _artifacts_url(text: str) -> str:
    url = urlsplit(text)
    located = url.path.startswith("/") and not url.netloc if url.scheme == "file" else bool(url.netloc)
    if url.scheme not in ("s3", "gs", "az", "file") or not located or url.query or url.fragment or "@" in text:
        raise ValueError(
            "must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///path, without "
            "credentials, which are read from the environment"
        )
    return text.rstrip("/")


class ArtifactSettings(Section):
    """Settings of the object store that several machines share for versions and clients' files. See docs/scale.md.

    Credentials are read from the environment, never from settings.
    """

    url: Annotated[str, AfterValidator(_artifacts_url)] | None = None
    """Object store for versions and clients' files: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`
    or `file:///path`; default: they are stored only in `home`."""
    checkpoints: bool = False
    """Whether checkpoints are also uploaded, so that another machine can resume a training run."""
    cache_gb: float | None = Field(None, gt=0)
    """Size of the versions in `home`, in GB, above which weights are removed, least recently used first, if they are
    also in the object store; also applies to `ray.folder` on each machine of a Ray cluster; default: unlimited."""
