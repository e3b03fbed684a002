"""A service with the Batch API, clients' files, and the official client over a real server."""

import json
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine as Store

from svc.store.files import Purpose
from tests.serving.http.fine_tuning_service import FineTuningService
from tests.serving.service import CHAT

CHAT_PATH: Final = "/v1/chat/completions"


def line(custom_id: str, *, url: str = CHAT_PATH, **fields: Any) -> str:
    """Return a line of an input file: a chat request, with more fields in its body."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": CHAT | fields}) + "\n"


def lines(count: int, **fields: Any) -> str:
    """Return an input file with the ids `r0`, `r1`, ..."""
    return "".join(line(f"r{number}", **fields) for number in range(count))


class BatchService(FineTuningService):
    """A service whose clients may create batches."""

    def __init__(self, folder: Path, *, store: Store) -> None:
        super().__init__(folder, store=store, base=None)

    def add_input(self, content: str, *, owner: str = "", **fields: Any) -> str:
        """Add an input file of a client and return its id."""
        return self.add_file(content, owner=owner, purpose=Purpose.BATCH, **fields)
