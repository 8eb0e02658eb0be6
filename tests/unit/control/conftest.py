"""Control over a fake engine, with time and names in the test's hand."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.harness import Harness, ManualClock
from tinsmith.control.identity import SignedIds
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.runtime.fake import FakeEngine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class CountedIds(SignedIds):
    """Names and seeds that count up; a new process (a new instance) starts at another hundred."""

    _processes = itertools.count(1)

    def __init__(self, key: bytes) -> None:
        number = next(self._processes)
        super().__init__(key, number.to_bytes(4, "big"))
        self._numbers = itertools.count(100 * number)

    def session_id(self) -> str:
        return f"sess-{next(self._numbers)}"

    def checkpoint_id(self) -> str:
        return f"ckpt-{next(self._numbers)}"

    def seed(self) -> int:
        return next(self._numbers)


OpenControl = Callable[..., AbstractAsyncContextManager[Harness]]


@pytest.fixture
def open_control(tmp_path: Path) -> OpenControl:
    """`async with open_control(setting=…) as h`; the same data folder every time, so a second one is a restart."""
    clock = ManualClock()

    @asynccontextmanager
    async def opened(engines: list[FakeEngine] | None = None, **settings: Any) -> AsyncIterator[Harness]:
        handles = engines or [FakeEngine()]
        values = {"data_dir": tmp_path / "data", "sweep_interval_s": 3600.0, **settings}
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
