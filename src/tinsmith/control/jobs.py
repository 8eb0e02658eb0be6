"""Requests whose answer is put together from the answers of others: a recipe behind a future."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from tinsmith.control.futures import FutureStore, RequestType
from tinsmith.control.journal import JobRecord, Journal
from tinsmith.control.ledger import Entry, put
from tinsmith.control.recipes import Recipes
from tinsmith.control.requests import Recipe
from tinsmith.types.errors import ServerError, StorageError, TinsmithError

logger = logging.getLogger(__name__)


class Jobs:
    def __init__(self, futures: FutureStore, journal: Journal, recipes: Recipes) -> None:
        self._futures = futures
        self._journal = journal
        self._recipes = recipes
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, request_type: RequestType, recipe: Recipe, *, session_id: str, subject: str | None, context: Any
    ) -> str:
        """The request id of a future that ends as the recipe does. It begins once it is on disk."""
        request_id = self._futures.open(
            request_type,
            session_id=session_id,
            subject=subject,
            context=context,
            is_durable=not self._journal.is_on,
        )

        def written(error: StorageError | None) -> None:
            self._futures.commit(request_id, error)
            if error is None:
                self._begin(request_id, recipe)

        record = JobRecord(request_type=request_type, recipe=recipe, subject=subject, context=context)
        if self._journal.is_on:
            self._journal.lone.add(request_id)
        self._journal.post([put(Entry(kind="job", name=request_id, session_id=session_id, value=record))], written)
        return request_id

    def restore(self, entry: Entry) -> None:
        """One that an earlier process took: it is done again."""
        record: JobRecord = entry.value
        self._futures.open(
            record.request_type,
            session_id=entry.session_id,
            subject=record.subject,
            context=record.context,
            request_id=entry.name,
        )
        self._journal.lone.add(entry.name)
        self._begin(entry.name, record.recipe)

    def _begin(self, request_id: str, recipe: Recipe) -> None:
        task = asyncio.create_task(self._run(request_id, recipe))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, request_id: str, recipe: Recipe) -> None:
        try:
            self._futures.resolve(request_id, await self._recipes.make(recipe))
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
