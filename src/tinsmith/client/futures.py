"""`APIFuture`: what every remote operation returns, for synchronous and asynchronous callers alike."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import warnings
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, ParamSpec, TypeVar

from tinsmith.client.errors import ClientClosedError
from tinsmith.client.loop import LoopThread, wait_for_outcome

T = TypeVar("T")
P = ParamSpec("P")


class APIFuture(Generic[T]):
    """A result that is on its way.

    From a plain thread: `result()`. In any event loop: `await future`, as often as you like; every waiter gets the
    same value or exception. Giving up waiting, by a timeout or by cancellation, does not stop the work.
    """

    def __init__(
        self, outcome: concurrent.futures.Future[T], loop: LoopThread | None = None, *, can_cancel: bool = False
    ) -> None:
        self._outcome = outcome
        self._loop = loop
        self._can_cancel = can_cancel

    def result(self, timeout: float | None = None) -> T:
        """The value. Raises `TimeoutError` after `timeout` seconds, and the operation's own error if it failed.

        Raises `RuntimeError` on the client's own loop thread (inside a callback of `future()`), where waiting would
        stop the very loop that brings the result, and `ClientClosedError` in a forked child, where none will come.
        """
        return self._outcome.result(self._bounded(timeout))

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, without blocking the running event loop."""
        async with asyncio.timeout(timeout):
            return await self.coroutine()

    def __await__(self) -> Generator[Any, None, T]:
        return self.coroutine().__await__()

    def future(self) -> concurrent.futures.Future[T]:
        """The same result as a `concurrent.futures.Future`. It cannot be cancelled."""
        return self._outcome

    async def coroutine(self) -> T:
        """The same result as a coroutine."""
        self._refuse_in_forked_child()
        return await wait_for_outcome(self._outcome)

    def cancel(self) -> bool:
        """Give up a sample: everyone who waits gets `concurrent.futures.CancelledError`, and a server that wants to
        know is told. False if there is a result already, or the operation cannot be taken back: those that train.
        """
        if self._outcome.done() or self._loop is None or not self._can_cancel:
            return False
        self._loop.cancel(self._outcome)
        return True

    def done(self) -> bool:
        return self._outcome.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error, or `None` if there is a value. Waits, and refuses to wait, as `result` does."""
        return self._outcome.exception(self._bounded(timeout))

    def add_done_callback(self, callback: Callable[[concurrent.futures.Future[T]], object]) -> None:
        """Call `callback` with `future()` once it is done, possibly on the client's own thread: keep it short."""
        self._outcome.add_done_callback(callback)

    def _bounded(self, timeout: float | None) -> float | None:
        """How long this thread may wait for the outcome."""
        if self._outcome.done() or self._loop is None:
            return timeout
        self._refuse_in_forked_child()
        if self._loop.is_current:
            raise RuntimeError("result() would wait for ever on the client's own thread; await the future instead")
        if not self._loop.is_alive:
            return 5.0 if timeout is None else min(timeout, 5.0)
        return timeout

    def _refuse_in_forked_child(self) -> None:
        if self._loop is not None and self._loop.is_forked and not self._outcome.done():
            raise ClientClosedError(self._loop.why_not_alive)

    def __repr__(self) -> str:
        if not self._outcome.done():
            state = "pending"
        elif self._outcome.exception() is not None:
            state = f"failed: {type(self._outcome.exception()).__name__}"
        else:
            state = "done"
        return f"<{type(self).__name__} {state}>"


class ClientFuture(APIFuture[T]):
    """A future of a client that older scripts use as the client itself: other public attributes wait for the client."""

    @classmethod
    def of(cls, future: APIFuture[T]) -> ClientFuture[T]:
        return cls(future._outcome, future._loop)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        client = self.result()
        value = getattr(client, name)
        _warn(f"use .result() or await to get the {type(client).__name__} before using .{name}", stacklevel=3)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.result(),)


def failed(error: BaseException) -> concurrent.futures.Future[Any]:
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
    outcome.set_exception(error)
    return outcome


def future_twin(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The deprecated `…_async` form of a method that returns a future: awaiting it gives that future."""

    async def start(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return _twin(method, start)


def value_twin(method: Callable[P, APIFuture[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The deprecated `…_async` form of a method that returns a future: awaiting it gives the value."""

    async def finish(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return _twin(method, finish)


def _twin(
    method: Callable[P, Any], coroutine_function: Callable[P, Coroutine[Any, Any, T]]
) -> Callable[P, Coroutine[Any, Any, T]]:
    name: str = method.__name__

    @functools.wraps(method)
    def twin(*args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
        _warn(f"{name}_async() is deprecated: await {name}() instead", stacklevel=3)
        return coroutine_function(*args, **kwargs)

    twin.__name__ = f"{name}_async"
    twin.__qualname__ = f"{method.__qualname__}_async"
    twin.__doc__ = f"Deprecated: await `{name}(…)` instead."
    return twin


def warn_deprecated(message: str) -> None:
    """A `FutureWarning` that points at the caller of the public method that calls this."""
    _warn(message, stacklevel=4)


def _warn(message: str, *, stacklevel: int) -> None:
    warnings.warn(message, FutureWarning, stacklevel=stacklevel)


def _itself(value: T) -> T:
    return value
