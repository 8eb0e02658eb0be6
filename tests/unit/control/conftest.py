"""Control over a fake engine, with time and names in the test's hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.harness import CountedIds, Harness, ManualClock
from tests.unit.control.restarts import Server
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FakeEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


OpenControl = Callable[..., AbstractAsyncContextManager[Harness]]


@pytest.fixture
def open_control(tmp_path: Path, database: str | None) -> OpenControl:
    """`async with open_control(setting=…) as h`; the same data folder every time, so a second one is a restart."""
    clock = ManualClock()

    @asynccontextmanager
    async def opened(engines: list[FakeEngine] | None = None, **settings: Any) -> AsyncIterator[Harness]:
        handles = engines or [FakeEngine()]
        values = {"data_dir": tmp_path / "data", "database": database, "sweep_interval_s": 3600.0, **settings}
        control = Control(ControlSettings(**values), handles, clock=clock, ids=CountedIds)
        await control.start()
        try:
            yield Harness(control, handles[0], clock)
        finally:
            await control.close()

    return opened


@pytest.fixture
async def h(open_control: OpenControl) -> AsyncIterator[Harness]:
    async with open_control() as harness:
        yield harness


@pytest.fixture
def server(tmp_path: Path) -> Server:
    """With a ledger; not started yet."""
    return Server(tmp_path / "data")
