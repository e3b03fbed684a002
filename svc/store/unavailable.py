"""The error of a store that cannot be used at the moment."""

from sqlalchemy.exc import SQLAlchemyError

from svc.errors import RegistryError


class StoreUnavailableError(SQLAlchemyError):
    """Raised when the store does not respond in time: a PostgreSQL server that is away, a locked file, a full disk.

    Whoever retries after an error of the store retries after this one too. The command line shows `shown`.
    """

    def __init__(self, shown: RegistryError) -> None:
        super().__init__(f"{shown.wrong}; {shown.todo}")
        self.shown = shown
