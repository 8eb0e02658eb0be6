"""Requests whose answer is put together from the answers of others: a coroutine behind a future."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from tinsmith.control.futures import FutureStore, RequestType
from tinsmith.types.errors import ServerError, TinsmithError

logger = logging.getLogger(__name__)


class Jobs:
    def __init__(self, futures: FutureStore) -> None:
        self._futures = futures
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        request_type: RequestType,
        work: Coroutine[Any, Any, Any],
        *,
        session_id: str | None,
        subject: str | None,
        context: Any,
    ) -> str:
        """The request id of a future that ends as `work` does."""
        request_id = self._futures.open(request_type, session_id=session_id, subject=subject, context=context)
        task = asyncio.create_task(self._run(request_id, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return request_id

    async def _run(self, request_id: str, work: Coroutine[Any, Any, Any]) -> None:
        try:
            self._futures.resolve(request_id, await work)
        except TinsmithError as error:
            self._futures.fail(request_id, error)
        except Exception as error:
            logger.exception("a job failed inside the server")
            self._futures.fail(request_id, ServerError(f"internal error: {error!r}; the server's log has the details"))

    async def close(self) -> None:
        """Stop what runs; the futures are failed by whoever closes their store."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
