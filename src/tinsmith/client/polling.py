"""Waiting for the result of an accepted request: `retrieve_future` until there is one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from tinsmith.client.budget import ByteBudget
from tinsmith.client.config import Timing
from tinsmith.client.errors import (
    APIConnectionError,
    APIResponseValidationError,
    APIStatusError,
    BadRequestError,
    BillingError,
    InternalServerError,
    RateLimitError,
    RequestFailedError,
    body_of,
)
from tinsmith.client.http import JSON_TYPE, PROTO_TYPE, Call, Http, Pool, json_bytes
from tinsmith.types.errors import RequestErrorCategory

M = TypeVar("M", bound=BaseModel)
logger = logging.getLogger("tinsmith.client")

QueueObserver: TypeAlias = Callable[[str, str | None], None]
"""Told `(queue_state, reason)` each time the server says why a request waits."""

_BAD_REQUESTS_MAX = 3
_CATEGORIES = {category.value: category for category in RequestErrorCategory}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A result as it came: protobuf or JSON."""

    response: httpx2.Response
    request_id: str

    @property
    def is_proto(self) -> bool:
        return PROTO_TYPE in self.response.headers.get("content-type", "")

    def proto_body(self) -> bytes:
        """Raises `APIResponseValidationError` if the result is JSON."""
        if not self.is_proto:
            message = f"the result of request {self.request_id!r} is JSON where the protocol asks for protobuf"
            raise APIResponseValidationError(self.response, body_of(self.response), message)
        return self.response.content

    def json_as(self, model: type[M]) -> M:
        try:
            return model.model_validate_json(self.response.content)
        except ValidationError as error:
            message = f"the result of request {self.request_id!r} is no valid {model.__name__}: {error}"
            raise APIResponseValidationError(self.response, body_of(self.response), message) from error


class ResultPoller:
    """Polls for one result. Ends with `Finished`, or raises; a server that keeps saying "not yet" is waited for.

    Raises `RequestFailedError` if the request failed, `PromiseExpiredError` if the server forgot it, and the last
    `APIConnectionError` or `InternalServerError` once polls have kept failing for `Timing.poll_give_up` seconds.
    """

    def __init__(
        self,
        http: Http,
        timing: Timing,
        budget: ByteBudget,
        request_id: str,
        *,
        request_type: str,
        observer: QueueObserver | None = None,
        metadata_only: bool = True,
        billing_give_up: float = 0.0,
        json_only: bool = False,
    ) -> None:
        self._http = http
        self._timing = timing
        self._budget = budget
        self._request_id = request_id
        self._request_type = request_type
        self._observer = observer
        self._metadata_only = metadata_only
        self._billing_give_up = billing_give_up
        self._json_only = json_only
        self._state: str | None = None
        self._failing_since: float | None = None
        self._failures = 0
        self._bad_requests = 0
        self._quick_replies = 0

    async def wait(self) -> Finished:
        iteration = 0
        while True:
            started = time.monotonic()
            try:
                response = await self._http.send(self._call(iteration))
                self._failing_since, self._failures, self._bad_requests = None, 0, 0
                outcome = self._read(response)
            except (APIConnectionError, APIStatusError) as error:
                await self._after_failed_poll(error, started)
                outcome = None
            else:
                if isinstance(outcome, Finished):
                    return outcome
                if outcome is not None:
                    async with self._budget.reserve(outcome):
                        self._metadata_only = False
                        return await self.wait()
                await self._pause_unless_held(started)
            iteration += 1

    def _call(self, iteration: int) -> Call:
        is_sample = self._request_type == "Sample"
        proto = self._request_type in ("Sample", "Forward", "ForwardBackward") and not self._json_only
        body = {"request_id": self._request_id, "allow_metadata_only": self._metadata_only}
        return Call(
            method="POST",
            path="retrieve_future",
            pool=Pool.RETRIEVE_SAMPLE if is_sample else Pool.RETRIEVE,
            body=json_bytes(body),
            accept=PROTO_TYPE if proto else JSON_TYPE,
            headers={
                "X-Tinker-Request-Iteration": str(iteration),
                "X-Tinker-Request-Type": self._request_type,
            },
            timeout=self._timing.poll_timeout,
        )

    def _read(self, response: httpx2.Response) -> Finished | int | None:
        """A result, the size of a result to be fetched, or `None` for "not yet"."""
        finished = Finished(response=response, request_id=self._request_id)
        if finished.is_proto:
            return finished
        body = body_of(response)
        if not isinstance(body, dict):
            message = f"the poll of request {self._request_id!r} was answered with no JSON object"
            raise APIResponseValidationError(response, body, message)
        if body.get("type") == "try_again":
            self._observe(body)
            return None
        if body.get("status") == "complete_metadata":
            return self._announced_size(body, response)
        if body.get("error") is not None:
            category = _CATEGORIES.get(str(body.get("category")).lower(), RequestErrorCategory.Unknown)
            raise RequestFailedError(str(body["error"]), self._request_id, category)
        return finished

    def _announced_size(self, body: dict[str, Any], response: httpx2.Response) -> int:
        size = body.get("response_payload_size") or 0
        if not self._metadata_only or not isinstance(size, int) or size < 0:
            message = f"request {self._request_id!r} was answered with metadata where its result was asked for"
            raise APIResponseValidationError(response, body, message)
        return size

    async def _after_failed_poll(self, error: APIConnectionError | APIStatusError, started: float) -> None:
        """Pause as the failure demands, or raise it."""
        if isinstance(error, APIStatusError) and error.status_code == 408:
            if isinstance(error.body, dict):
                self._observe(error.body)
            self._failing_since, self._failures = None, 0
            await self._pause_unless_held(started)
        elif isinstance(error, RateLimitError):
            await asyncio.sleep(self._backoff(error.retry_after_ms))
        elif isinstance(error, BillingError) and self._billing_give_up > 0:
            now = time.monotonic()
            self._failing_since = self._failing_since or started
            if now - self._failing_since >= self._billing_give_up:
                raise error
            logger.warning("request %s waits for billing to be set up: %s", self._request_id, error)
            await asyncio.sleep(self._timing.billing_pause)
        elif isinstance(error, BadRequestError) and self._bad_requests < _BAD_REQUESTS_MAX:
            self._bad_requests += 1
        elif isinstance(error, InternalServerError | APIConnectionError):
            now = time.monotonic()
            self._failing_since = self._failing_since or started
            if now - self._failing_since >= self._timing.poll_give_up:
                raise error
            await asyncio.sleep(self._backoff(error.retry_after_ms))
        else:
            raise error

    def _backoff(self, asked_ms: int | None) -> float:
        self._failures += 1
        if asked_ms is not None:
            return min(asked_ms / 1000, 60.0)
        delay = self._timing.poll_retry_initial * 2.0 ** min(self._failures - 1, 16)
        return min(delay, self._timing.poll_retry_max)

    async def _pause_unless_held(self, started: float) -> None:
        """A server that holds its polls is asked again at once; one that does not is given a growing pause."""
        if time.monotonic() - started >= self._timing.poll_held:
            self._quick_replies = 0
            return
        pause = self._timing.poll_pause_initial * 2.0 ** min(self._quick_replies, 16)
        self._quick_replies += 1
        await asyncio.sleep(min(pause, self._timing.poll_pause_max))

    def _observe(self, body: dict[str, Any]) -> None:
        if not body.get("queue_state"):
            return
        state, reason = str(body["queue_state"]), body.get("queue_state_reason")
        if state != self._state:
            self._state = state
            self._http.events.emit("queue.state", request_id=self._request_id, state=state, reason=reason)
        if self._observer is not None:
            self._observer(state, None if reason is None else str(reason))


class QueueStateLog:
    """Says in the log why requests wait, at most once a minute for each owner."""

    def __init__(self, owner: str, *, every: float = 60.0) -> None:
        self._owner = owner
        self._every = every
        self._last = -every

    def __call__(self, state: str, reason: str | None) -> None:
        now = time.monotonic()
        if state == "active" or now - self._last < self._every:
            return
        self._last = now
        logger.warning("%s waits: the server says %s%s", self._owner, state, f" ({reason})" if reason else "")
