"""The whole server over a fake engine, reached without a port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.server import ServerSettings, create_app
from tinsmith.types.operations import BaseModelCard


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def open_server(tmp_path: Path, database: str | None) -> OpenServer:
    @asynccontextmanager
    async def opened(
        control: dict[str, Any] | None = None, card: BaseModelCard = FAKE_CARD, **settings: Any
    ) -> AsyncIterator[Client]:
        engine = FakeEngine(card)
        values = {"data_dir": tmp_path / "data", "database": database, **(control or {})}
        service = Control(ControlSettings(**values), [engine])
        app = create_app(service, ServerSettings(**({"poll_hold_s": 5.0} | settings)))
        async with app.router.lifespan_context(app):
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
                yield Client(http, engine, app)

    return opened


@pytest.fixture
async def client(open_server: OpenServer) -> AsyncIterator[Client]:
    async with open_server() as opened:
        yield opened
