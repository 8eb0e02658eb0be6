"""One poll for all samples of a sampling session, where the server asks for that (`sample_use_retrieve_futures`)."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from tinsmith.client.config import Timing
from tinsmith.client.errors import (
    APIConnectionError,
    APIStatusError,
    BadRequestError,
    BillingError,
    RateLimitError,
    TinkerError,
)
from tinsmith.client.http import Http, Pool, post
from tinsmith.types.replies import FutureCompletion, FuturesRetrieveResponse

logger = logging.getLogger("tinsmith.client")

_ACK_TIMEOUT_S = 5.0
_BAD_REQUESTS_MAX = 3


class CompletionPoller:
    """Asks which samples have ended while somebody waits for one. Use on the client's event loop only.

    An error that will not pass ends the poller: everyone who waits, and everyone after, gets it. Once polls have kept
    failing for `Timing.poll_give_up` seconds, or for `billing_give_up` with 402, those who wait get the last error.
    """

    def __init__(
        self,
        http: Http,
        timing: Timing,
        sampling_session_id: str,
        clone_id: int,
        *,
        billing_give_up: float = 0.0,
    ) -> None:
        self._http = http
        self._timing = timing
        self._billing_give_up = billing_give_up
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
        self._failing_since: float | None = None

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
        except Exception as error:  # noqa: BLE001  a task boundary: whoever waits gets what it ended with
            if isinstance(error, TinkerError) and not _may_pass(error):
                self._failure = error
            self._failing_since = None
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
            self._bear(error)
            await asyncio.sleep(self._timing.poll_retry_initial)
            return
        self._bad_requests, self._failing_since = 0, None
        self._retrieved = self._retrieved[len(told) :]
        self._cursor = reply.cursor
        for completion in reply.completions:
            waiter = self._waiting.get(completion.request_id)
            if waiter is None:
                self._early[completion.request_id] = completion
            elif not waiter.done():
                waiter.set_result(completion)
        await asyncio.sleep(0)  # those who were woken take themselves off the list

    def _bear(self, error: APIConnectionError | APIStatusError) -> None:
        """Raises the error if it will not pass, or has not passed for too long."""
        if isinstance(error, BadRequestError):
            self._bad_requests += 1
            if self._bad_requests > _BAD_REQUESTS_MAX:
                raise error
            return
        if not _may_pass(error):
            raise error
        logger.info("the poll of sampling session %s failed: %s", self._target["sampling_session_id"], error)
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        limit = self._billing_give_up if isinstance(error, BillingError) else self._timing.poll_give_up
        if now - self._failing_since >= limit and not isinstance(error, RateLimitError):
            raise error


def _may_pass(error: TinkerError) -> bool:
    return error.retryable or isinstance(error, BillingError)
