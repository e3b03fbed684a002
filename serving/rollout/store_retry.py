"""Retries calls to the store while it is not responding. Serving continues meanwhile."""

import asyncio
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from svc.store.outage_log import log_store_error

log = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

STORE_PAUSE_S = 2.0


async def retrying(
    call: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
) -> Result:
    """In a thread, call a function that accesses the store. Retry until the store responds, and return the result."""
    while True:
        try:
            return await asyncio.to_thread(call, *arguments, **options)
        except SQLAlchemyError:
            log_store_error(log, "the store is not responding; serving continues, and the call is retried")
            await asyncio.sleep(STORE_PAUSE_S)
