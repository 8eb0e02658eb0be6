"""A server that asks for keys: its users, and a client for each key."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.control.administration import Administration
from tinsmith.control.identities import LOCAL, Key


class Keyed:
    def __init__(self, local: Client) -> None:
        self.app = local.app
        self.engine = local.engine
        self._http = local.http

    @property
    def deeds(self) -> Administration:
        made: Administration = self.app.state.service.control.administration(LOCAL)
        return made

    async def user(self, user_id: str, role: str = "member") -> None:
        await self.deeds.create_user(user_id, role)

    async def key(self, user_id: str, **options: Any) -> tuple[str, Key]:
        return await self.deeds.create_key(user_id, **options)

    def client(self, secret: str | None, **headers: str) -> Client:
        given = ({} if secret is None else {"x-api-key": secret}) | headers
        transport = httpx2.ASGITransport(self.app)
        return Client(
            httpx2.AsyncClient(transport=transport, base_url="http://test", headers=given), self.engine, self.app
        )

    async def member(self, user_id: str, role: str = "member", **options: Any) -> Client:
        await self.user(user_id, role)
        return self.client((await self.key(user_id, **options))[0])


@asynccontextmanager
async def keyed_server(open_server: OpenServer, **settings: Any) -> AsyncIterator[Keyed]:
    async with open_server(**settings) as local:
        yield Keyed(local)
