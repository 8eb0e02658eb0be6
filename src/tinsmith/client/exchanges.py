"""What the clients of the REST part have in common: a connection of their own or a shared one, and plain exchanges."""

from __future__ import annotations

from typing import Self, TypeVar

from pydantic import BaseModel

from tinsmith.client.config import Timing, resolve_config
from tinsmith.client.connection import Connection
from tinsmith.client.events import Events
from tinsmith.client.futures import APIFuture
from tinsmith.client.http import Call

M = TypeVar("M", bound=BaseModel)


class RestExchanges:
    """`base_url` and `api_key` are found as for `ServiceClient`. No session is opened."""

    def __init__(
        self, _holder: Connection | None = None, *, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self._owns_connection = _holder is None
        self._connection = _holder or Connection(resolve_config(base_url=base_url, api_key=api_key, timing=Timing()))

    @classmethod
    def with_timing(cls, timing: Timing, *, base_url: str | None = None, api_key: str | None = None) -> Self:
        """A client on a connection of its own, with other waits than the usual ones."""
        client = cls(Connection(resolve_config(base_url=base_url, api_key=api_key, timing=timing)))
        client._owns_connection = True
        return client

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._connection.config.base_url}>"

    def get_telemetry(self) -> Events:
        """Where this client's events go."""
        return self._connection.link.events

    def close(self) -> APIFuture[None]:
        """Close the connections, unless a `ServiceClient` shares them."""
        if self._owns_connection:
            return self._connection.close("success", None)

        async def nothing() -> None:
            return None

        return self._connection.begin(nothing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close().result(timeout=2 * self._connection.config.timing.close_timeout)
        if self._owns_connection:
            self._connection.join()

    def _read(self, call: Call, model: type[M]) -> APIFuture[M]:
        return self._connection.begin(lambda: self._fetch(call, model))

    async def _fetch(self, call: Call, model: type[M]) -> M:
        link = self._connection.link
        await link.configure()
        return await link.http.send_for(call, model, link.submit_retry)

    async def _command(self, call: Call) -> None:
        link = self._connection.link
        await link.configure()
        await link.http.send(call, link.submit_retry)
