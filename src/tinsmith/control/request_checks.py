"""Training requests are checked before their turn: small ones at once, large ones in a thread, and those that are still
being put together once they are complete."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tinsmith.control.admission import check_request
from tinsmith.control.futures import FutureStore
from tinsmith.control.journal import Journal
from tinsmith.control.models import Model, Work, slot_of
from tinsmith.control.requests import ForwardBackward, ModelRequest, Rejected
from tinsmith.types.errors import ServerError, TinsmithError

logger = logging.getLogger(__name__)

INLINE_TOKENS = 1024
"""Data up to this size are validated at once; larger ones in a thread, so that the event loop stays free."""


class RequestChecks:
    def __init__(self, futures: FutureStore, journal: Journal, *, wake: Callable[[Model], None]) -> None:
        """`wake` is told of every model a request of which may be ready now."""
        self._futures = futures
        self._journal = journal
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()
        self._validator = ThreadPoolExecutor(max_workers=1, thread_name_prefix="validator")

    def check(self, model: Model, work: Work, request: ModelRequest) -> None:
        """A fault fails the request's future and makes its work void."""
        if isinstance(request, Rejected) or work.num_tokens <= INLINE_TOKENS:
            self._settle(model, work, _find_fault(request, model))
            return
        work.is_checked = False
        self._start(self._check_aside(model, work, request))

    def check_once_complete(
        self,
        model: Model,
        work: Work,
        prepare: Callable[[], Awaitable[ForwardBackward]],
        completed: Callable[[ForwardBackward], None],
    ) -> None:
        """`completed` is given what `prepare` made, before it is checked; what `prepare` raises is the fault."""
        self._start(self._prepare(model, work, prepare, completed))

    async def drain(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def stop(self) -> None:
        """Complete and check nothing more; the futures are failed by whoever closes their store."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        self._validator.shutdown()

    def _start(self, check: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(check)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(
        self,
        model: Model,
        work: Work,
        prepare: Callable[[], Awaitable[ForwardBackward]],
        completed: Callable[[ForwardBackward], None],
    ) -> None:
        try:
            request = await prepare()
        except TinsmithError as error:
            await self._give_up(model, work, error)
            return
        except Exception as error:
            logger.exception("a training request could not be prepared")
            fault = ServerError(f"internal error: {error!r}; the server's log has the details")
            await self._give_up(model, work, fault)
            return
        if model.has_ended:  # the future has failed with the model
            return
        completed(request)
        self.check(model, work, request)

    async def _give_up(self, model: Model, work: Work, fault: TinsmithError) -> None:
        await self._journal.note_failed(work.request_id, fault)
        self._settle(model, work, fault)

    async def _check_aside(self, model: Model, work: Work, request: ModelRequest) -> None:
        loop = asyncio.get_running_loop()
        fault = await loop.run_in_executor(self._validator, _find_fault, request, model)
        self._settle(model, work, fault)

    def _settle(self, model: Model, work: Work, fault: TinsmithError | None) -> None:
        work.is_checked = True
        if fault is not None:
            work.is_void = True
            self._futures.fail(work.request_id, fault)
        self._wake(model)


def _find_fault(request: ModelRequest, model: Model) -> TinsmithError | None:
    try:
        check_request(request, slot_of(model).card)
    except TinsmithError as error:
        return error
    except Exception as error:
        logger.exception("validation failed inside the server")
        return ServerError(f"internal error in validation: {error!r}; the server's log has the details")
    return None
