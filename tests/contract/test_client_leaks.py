"""Clients come and go and leave nothing behind: no threads, no descriptors, no memory."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tinsmith.client import RestClient, ServiceClient

CYCLES = 1000 if os.environ.get("FAULTS") else 100
WARM_UP = 10


class Answers(BaseHTTPRequestHandler):
    """Just enough of a server for a session to open and close."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b'{"session_id": "s", "sampling_session_id": "s:sample:0"}'
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        return None


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="answers")
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


def cycle(address: str) -> None:
    with ServiceClient(base_url=address) as service:
        sampler = service.create_sampling_client(base_model="m").result(10)
        assert sampler.get_base_model() == "m"
    RestClient(base_url=address).close().result(10)


def own_threads() -> int:
    return sum(thread.name.startswith("tinsmith") for thread in threading.enumerate())


def own_descriptors() -> int:
    """Sockets of the answering side close a moment later, in threads of their own: only ours are counted."""
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and "eventpoll" in os.readlink(link) for link in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_clients_by_the_hundred_leave_no_threads_descriptors_or_memory(address: str) -> None:
    for _ in range(WARM_UP):
        cycle(address)
    gc.collect()
    threads, polls, files = own_threads(), own_descriptors(), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    held = []
    for _ in range(2):
        for _ in range(CYCLES // 2):
            cycle(address)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    deadline = time.monotonic() + 5
    while own_threads() > threads and time.monotonic() < deadline:  # a thread ends a moment after its last future
        time.sleep(0.01)
    assert own_threads() <= threads
    assert own_descriptors() <= polls
    assert len(os.listdir("/proc/self/fd")) <= files + 4
    assert held[1] - held[0] < CYCLES // 2 * 1_000


def test_clients_that_are_dropped_instead_of_closed_end_too(address: str) -> None:
    threads = own_threads()
    clients = [RestClient(base_url=address) for _ in range(5)]
    assert own_threads() == threads + 5
    clients.clear()
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("tinsmith"):
            thread.join(5)
    assert own_threads() <= threads
