"""The error raised when the store cannot be used at the moment."""

from sqlalchemy.exc import SQLAlchemyError

from svc.errors import RegistryError


class StoreUnavailableError(SQLAlchemyError):
    """Raised when the store cannot be used now, for example because PostgreSQL is down, the file is locked or the disk
    is full.

    It is an SQLAlchemyError, so that code that retries after store errors also retries after this error. The command
    line prints the attribute `shown` instead.
    """

    def __init__(self, shown: RegistryError) -> None:
        super().__init__(f"{shown.wrong}; {shown.todo}")
        self.shown = shown
