"""What a client call can raise.

    TinkerError                          type "tinker"
    ├── APIError                         one HTTP exchange failed; has `.request` (without credentials)
    │   ├── APIConnectionError           no answer came; type "api_connection"
    │   │   ├── APITimeoutError          none came in time; type "api_timeout"
    │   │   └── CircuitOpenError         not even tried: earlier calls have failed again and again
    │   ├── APIResponseValidationError   the answer is not what the protocol says; type "validation"
    │   └── APIStatusError               the answer is an HTTP error; type "api_status"
    │       ├── BadRequestError 400, AuthenticationError 401, BillingError 402, PermissionDeniedError 403
    │       ├── NotFoundError 404, ConflictError 409, PromiseExpiredError 410, UnprocessableEntityError 422
    │       └── RateLimitError 429, InternalServerError ≥ 500
    ├── RequestFailedError               the server accepted the request and could not do it; type "request_failed"
    ├── ClientClosedError                the client was closed first; type "client_closed"
    └── ConfigurationError               cannot be set up like this (a `ValueError` too); type "configuration"

Every one of them answers `message`, `type`, `status`, `category`, `request_id`, `retryable`, `retry_after_ms`, `data`
and `advice` (what to do now); what is not known is `None`. `as_dict()` gives them all.
"""

from __future__ import annotations

import email.utils
import time
from typing import Any, ClassVar

import httpx2

from tinsmith.types.errors import RequestErrorCategory

_RETRYABLE_STATUS = frozenset({408, 409, 429})
_BLAMELESS_4XX = frozenset({408, 429})


_ADVICE = {
    401: "Check the API key: TINKER_API_KEY, or the argument api_key.",
    402: "The account has no valid billing; set it up, then go on.",
    403: "The key may not do this; use one with the right scope, or ask the owner of the object.",
    404: "The object does not exist here or is not yours; list what there is with RestClient or `tinsmith run list`.",
    410: "The server no longer holds the result; send the request again.",
    429: "Send less at once, or wait as long as retry_after_ms says.",
}


class TinkerError(Exception):
    """Root of everything the client raises on purpose."""

    type: ClassVar[str] = "tinker"
    message: str
    status: int | None = None
    category: RequestErrorCategory = RequestErrorCategory.Unknown
    request_id: str | None = None
    retryable: bool = False
    retry_after_ms: int | None = None

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    @property
    def data(self) -> object | None:
        """What the server sent about the error beside its message."""
        return None

    @property
    def advice(self) -> str:
        """What to do now, in a sentence."""
        return "Look at the message."

    def as_dict(self) -> dict[str, Any]:
        """Everything known about the error, for logs and for programs. No credentials."""
        return {
            "message": self.message,
            "type": self.type,
            "status": self.status,
            "category": str(self.category),
            "data": self.data,
            "retry_after_ms": self.retry_after_ms,
            "request_id": self.request_id,
            "retryable": self.retryable,
            "advice": self.advice,
        }

    @property
    def user_error(self) -> bool:
        """Whether the request itself is at fault, so that sending it again changes nothing."""
        return self.category is RequestErrorCategory.User


class ClientClosedError(TinkerError, RuntimeError):
    type = "client_closed"

    @property
    def advice(self) -> str:
        return "Make a new ServiceClient; models that were saved can be loaded from their checkpoints."


class ConfigurationError(TinkerError, ValueError):
    type = "configuration"
    category = RequestErrorCategory.User

    @property
    def advice(self) -> str:
        return "Correct the argument or environment variable that the message names."


class APIError(TinkerError):
    """`body` is the decoded JSON of the answer, its text if it is no JSON, or `None` without an answer."""

    request: httpx2.Request
    body: object | None

    def __init__(self, message: str, request: httpx2.Request, *, body: object | None) -> None:
        super().__init__(message)
        self.request = request
        self.body = body

    @property
    def data(self) -> object | None:
        return self.body


class APIConnectionError(APIError):
    type = "api_connection"
    retryable = True

    def __init__(self, request: httpx2.Request, message: str = "Connection error.") -> None:
        super().__init__(message, request, body=None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.request, self.message)

    @property
    def advice(self) -> str:
        return "Is the server running, and is base_url right? If so, try again: nothing is done twice."


class APITimeoutError(APIConnectionError):
    type = "api_timeout"

    def __init__(self, request: httpx2.Request, *, message: str = "Request timed out.") -> None:
        super().__init__(request=request, message=message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _timeout_error, (self.request, self.message)


class CircuitOpenError(APIConnectionError):
    """Earlier calls of this kind have all failed, so this one was not sent."""

    type = "circuit_open"


class APIResponseValidationError(APIError):
    type = "validation"
    category = RequestErrorCategory.Server

    response: httpx2.Response
    status_code: int

    def __init__(self, response: httpx2.Response, body: object | None, message: str | None = None) -> None:
        text = message or "Data returned by API invalid for expected schema."
        super().__init__(text, response.request, body=body)
        self.response = response
        self.status_code = self.status = response.status_code

    @property
    def advice(self) -> str:
        return "The server speaks another protocol or version; compare its version with this client's."

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.response, self.body, self.message)


class APIStatusError(APIError):
    type = "api_status"

    response: httpx2.Response
    status_code: int

    def __init__(self, message: str, response: httpx2.Response, body: object | None) -> None:
        super().__init__(message, response.request, body=body)
        self.response = response
        self.status_code = self.status = response.status_code
        self.category = _category_of(response.status_code)
        self.retryable = is_retryable(response)
        self.retry_after_ms = retry_after_ms(response)
        self.request_id = response.headers.get("x-request-id")

    @property
    def advice(self) -> str:
        if self.status_code in _ADVICE:
            return _ADVICE[self.status_code]
        if self.retryable:
            return "Try again later; the client has already retried for as long as its settings allow."
        return "Change the request as the message says; sending it again changes nothing."

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.response, self.body)


class BadRequestError(APIStatusError):
    status_code: int = 400


class AuthenticationError(APIStatusError):
    status_code: int = 401


class BillingError(APIStatusError):
    status_code: int = 402


class PermissionDeniedError(APIStatusError):
    status_code: int = 403


class NotFoundError(APIStatusError):
    status_code: int = 404


class ConflictError(APIStatusError):
    status_code: int = 409


class PromiseExpiredError(APIStatusError):
    """The server no longer holds the result of a request; the request can be sent anew."""

    status_code: int = 410


class UnprocessableEntityError(APIStatusError):
    status_code: int = 422


class RateLimitError(APIStatusError):
    status_code: int = 429


class InternalServerError(APIStatusError):
    pass


class RequestFailedError(TinkerError):
    """The future of an accepted request ended in a failure, which `category` blames on the user or the server."""

    type = "request_failed"

    def __init__(self, message: str, request_id: str, category: RequestErrorCategory) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.category = category
        self.retryable = category is RequestErrorCategory.Server

    @property
    def advice(self) -> str:
        if self.category is RequestErrorCategory.User:
            return "Correct what the message names; the client and, unless it says otherwise, the model stay usable."
        return "The server could not do it; try again, and if it keeps failing, recover from the last checkpoint."

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.request_id, self.category)


_BY_STATUS: dict[int, type[APIStatusError]] = {
    error.status_code: error
    for error in (
        BadRequestError,
        AuthenticationError,
        BillingError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        PromiseExpiredError,
        UnprocessableEntityError,
        RateLimitError,
    )
}


def status_error(response: httpx2.Response) -> APIStatusError:
    """The error for an HTTP status of 400 or more; `response` has been read."""
    body = body_of(response)
    kind = _BY_STATUS.get(response.status_code)
    if kind is None:
        kind = InternalServerError if response.status_code >= 500 else APIStatusError
    shown = body if body not in (None, "") else response.reason_phrase
    return kind(f"Error code: {response.status_code} - {shown}", response, body)


def body_of(response: httpx2.Response) -> object | None:
    """JSON if it is JSON, else the text, else `None`."""
    try:
        body: object = response.json()
    except ValueError:
        return response.text or None
    return body


def is_retryable(response: httpx2.Response) -> bool:
    """As `x-should-retry` says; without it, timeouts, conflicts, rate limits and server errors are."""
    match response.headers.get("x-should-retry"):
        case "true":
            return True
        case "false":
            return False
    return response.status_code >= 500 or response.status_code in _RETRYABLE_STATUS


def retry_after_ms(response: httpx2.Response) -> int | None:
    """What `retry-after-ms` or `retry-after` (seconds, or an HTTP date) asks for, if it can be read and is positive."""
    exact = _number(response.headers.get("retry-after-ms"))
    if exact is not None:
        return int(exact) if exact > 0 else None
    text = response.headers.get("retry-after")
    seconds = _number(text)
    if seconds is None and text:
        date = email.utils.parsedate_tz(text)
        seconds = None if date is None else email.utils.mktime_tz(date) - time.time()
    return int(seconds * 1000) if seconds is not None and seconds > 0 else None


def in_context(error: BaseException, context: str) -> BaseException:
    """The same error, its message now starting with `context`."""
    if isinstance(error, TinkerError):
        error.message = f"{context}: {error.message}"
        error.args = (error.message, *error.args[1:])
    else:
        error.add_note(context)
    return error


def _category_of(status: int) -> RequestErrorCategory:
    if 400 <= status < 500 and status not in _BLAMELESS_4XX:
        return RequestErrorCategory.User
    return RequestErrorCategory.Server if status >= 500 else RequestErrorCategory.Unknown


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if number < float("inf") else None


def _timeout_error(request: httpx2.Request, message: str) -> APITimeoutError:
    return APITimeoutError(request, message=message)
