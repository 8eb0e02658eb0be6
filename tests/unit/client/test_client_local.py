"""Which embedded server a client gets, without the server: one that only says when it is open."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import types
from collections.abc import Awaitable, Callable

import httpx2
import pytest

import tinsmith
from tinsmith.client import ClientClosedError
from tinsmith.client.local import LocalTransport


class Embedded(types.ModuleType):
    """Stands for `tinsmith.embedded`; notes what opens and closes, and takes its time to close."""

    def __init__(self) -> None:
        super().__init__("embedded")
        self.noted: list[str] = []

    async def open_local(self, url: str) -> tuple[httpx2.AsyncBaseTransport, Callable[[], Awaitable[None]]]:
        self.noted.append(f"open {url}")

        async def close() -> None:
            self.noted.append(f"closing {url}")
            for _ in range(20):
                await asyncio.sleep(0.002)
            self.noted.append(f"closed {url}")

        return httpx2.MockTransport(lambda _: httpx2.Response(200)), close


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Embedded:
    module = Embedded()
    monkeypatch.setitem(sys.modules, "tests.embedded", module)
    monkeypatch.setattr("tinsmith.client.local._EMBEDDED", "tests.embedded")
    return module


@pytest.mark.parametrize("second", ["local:", "local:?dtype=float32"])
@pytest.mark.anyio
async def test_a_server_opens_once_one_that_may_hold_its_folder_has_closed(embedded: Embedded, second: str) -> None:
    first = LocalTransport("local:")
    await first.ready()
    closing = asyncio.create_task(first.aclose())
    while "closing local:" not in embedded.noted:  # noqa: ASYNC110  noted on another thread
        await asyncio.sleep(0.001)
    other = LocalTransport(second)
    await other.ready()
    await closing
    assert embedded.noted == ["open local:", "closing local:", "closed local:", f"open {second}"]
    await other.aclose()


@pytest.mark.anyio
async def test_clients_of_one_address_share_a_server(embedded: Embedded) -> None:
    first, second = LocalTransport("local:"), LocalTransport("local:")
    await first.ready()
    await second.ready()
    await first.aclose()
    assert (await second.handle_async_request(httpx2.Request("GET", "http://x/"))).status_code == 200
    await second.aclose()
    assert embedded.noted == ["open local:", "closing local:", "closed local:"]


@pytest.mark.anyio
async def test_a_server_closed_while_it_starts_is_closed_once_it_has_started(
    embedded: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, open_at_once = threading.Event(), embedded.open_local

    async def open_slowly(url: str) -> tuple[httpx2.AsyncBaseTransport, Callable[[], Awaitable[None]]]:
        await asyncio.to_thread(loaded.wait, 10)
        return await open_at_once(url)

    monkeypatch.setattr(embedded, "open_local", open_slowly)
    client = tinsmith.RestClient(base_url="local:")
    asked, closing = client.get_server_capabilities(), client.close()
    await asyncio.sleep(0.05)
    loaded.set()
    await closing
    with pytest.raises(ClientClosedError):
        await asked
    assert embedded.noted == ["open local:", "closing local:", "closed local:"]


PROGRAM = """
import asyncio, sys, types
import httpx2
import tinsmith

async def close():
    await asyncio.to_thread(print, "closed in good order")

async def open_local(url):
    return httpx2.MockTransport(lambda _: httpx2.Response(200, json={"supported_models": []})), close

module = types.ModuleType("embedded")
module.open_local = open_local
sys.modules["tinsmith.embedded"] = module
client = tinsmith.RestClient(base_url="local:")
print(client.get_server_capabilities().result(5).supported_models)
"""


def test_a_program_that_just_ends_closes_its_server_while_threads_can_still_be_had() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "closed in good order"]


FORKING = """
import os, sys, types, warnings
import httpx2
import tinsmith

warnings.simplefilter("ignore")

async def close():
    if os.getpid() == parent:
        os.write(closing, b"!")
        import asyncio
        await asyncio.sleep(60)

async def open_local(url):
    served = "the parent" if os.getpid() == parent else "the child"
    model = {"model_name": served}
    return httpx2.MockTransport(lambda _: httpx2.Response(200, json={"supported_models": [model]})), close

def ask(url):
    client = tinsmith.RestClient(base_url=url)
    print([one.model_name for one in client.get_server_capabilities().result(5).supported_models], flush=True)
    return client

parent = os.getpid()
is_closing, closing = os.pipe()
module = types.ModuleType("embedded")
module.open_local = open_local
sys.modules["tinsmith.embedded"] = module
first, second = ask("local:"), ask("local:?dtype=float32")
second.close()
os.read(is_closing, 1)  # a server under way to its end, and one that runs
child = os.fork()
if child == 0:
    ask("local:")
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_a_server_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines() == ["['the parent']", "['the parent']", "['the child']"], done.stderr
