"""One poll for all samples of a sampling session, where the server asks for that (`sample_use_retrieve_futures`)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from tinsmith.client.config import Timing
from tinsmith.client.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    BillingError,
    TinkerError,
)
from tinsmith.client.http import Http, Pool, post
from tinsmith.types.replies import FutureCompletion, FuturesRetrieveResponse

logger = logging.getLogger("tinsmith.client")

_ACK_TIMEOUT_S = 5.0
_BAD_REQUESTS_MAX = 3


class CompletionPoller:
    """Asks which samples have ended while somebody waits for one. Use on the client's event loop only.

    An error that will not pass ends the poller: everyone who waits, and everyone after, gets it.
    """

    def __init__(self, http: Http, timing: Timing, sampling_session_id: str, clone_id: int) -> None:
        self._http = http
        self._timing = timing
        self._target = {
            "type": "sampling_session",
            "sampling_session_id": sampling_session_id,
            "cloned_sampler_id": clone_id,
        }
        self._waiting: dict[str, asyncio.Future[FutureCompletion]] = {}
        self._early: dict[str, FutureCompletion] = {}
        self._retrieved: list[str] = []
        self._cursor = 0
        self._polling: asyncio.Task[None] | None = None
        self._failure: TinkerError | None = None
        self._bad_requests = 0

    async def ended(self, request_id: str) -> FutureCompletion:
        """Wait until the server says that a request has ended, well or badly."""
        if self._failure is not None:
            raise self._failure
        if request_id in self._early:
            return self._early.pop(request_id)
        waiter = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            completion: FutureCompletion = await waiter
            return completion
        finally:
            self._waiting.pop(request_id, None)

    def retrieved(self, request_id: str) -> None:
        """The result has been downloaded: the server may forget it. Told with the next poll."""
        self._retrieved.append(request_id)
        if not self._waiting and (self._polling is None or self._polling.done()) and self._failure is None:
            self._polling = asyncio.create_task(self._poll())

    async def _poll(self) -> None:
        """Poll until nobody waits, then acknowledge what is left to acknowledge."""
        try:
            acknowledged = self._cursor
            while self._waiting or self._retrieved or acknowledged != self._cursor:
                hold = bool(self._waiting)
                acknowledged = self._cursor
                await self._once(hold=hold)
                if not hold:
                    acknowledged = self._cursor
        except TinkerError as error:
            self._failure = error
            for waiter in self._waiting.values():
                if not waiter.done():
                    waiter.set_exception(error)

    async def _once(self, *, hold: bool) -> None:
        told = list(self._retrieved)
        body: dict[str, Any] = {
            "target": self._target,
            "prev_cursor": self._cursor,
            "retrieved_request_ids": told,
            **({} if hold else {"timeout": 0.0}),
        }
        timeout = self._timing.poll_timeout if hold else _ACK_TIMEOUT_S
        call = post("retrieve_futures", body, pool=Pool.RETRIEVE_SAMPLE, timeout=timeout)
        try:
            reply = await self._http.send_for(call, FuturesRetrieveResponse)
        except (APIConnectionError, APIStatusError) as error:
            if not self._may_pass(error):
                raise
            await asyncio.sleep(self._timing.poll_retry_initial)
            return
        self._bad_requests = 0
        self._retrieved = self._retrieved[len(told) :]
        self._cursor = reply.cursor
        for completion in reply.completions:
            waiter = self._waiting.get(completion.request_id)
            if waiter is None:
                self._early[completion.request_id] = completion
            elif not waiter.done():
                waiter.set_result(completion)
        await asyncio.sleep(0)  # those who were woken take themselves off the list

    def _may_pass(self, error: APIConnectionError | APIStatusError) -> bool:
        if isinstance(error, BadRequestError):
            self._bad_requests += 1
            return self._bad_requests <= _BAD_REQUESTS_MAX
        logger.info("the poll of sampling session %s failed: %s", self._target["sampling_session_id"], error)
        return isinstance(error, APIConnectionError | BillingError) or error.retryable
