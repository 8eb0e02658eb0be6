"""From the bytes of a request to Python values, off the event loop when there are many."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson
from starlette.requests import Request

from tinsmith.types.errors import InvalidInput
from tinsmith.wire.compression import decompress
from tinsmith.wire.tinker_proto import WireError

T = TypeVar("T")

_LONG_NUMBER = re.compile(rb"[0-9]{19}")
"""Beyond 64 bits orjson returns a rounded float; such a body goes to the slower standard parser."""


class Codecs:
    """The threads that decode large bodies and encode large results."""

    def __init__(self, *, threads: int, offload_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tinsmith-codec")
        self._offload_bytes = offload_bytes

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """`work()`, in a thread if it is about more than a few kilobytes."""
        if size <= self._offload_bytes:
            return work()
        return await self.offload(work)

    async def offload(self, work: Callable[[], T]) -> T:
        """`work()`, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def decode(self, request: Request, body: bytes, work: Callable[[], T]) -> T:
        """`run` for `work` on a body; a compressed one may be any size inside."""
        is_compressed = "content-encoding" in request.headers
        return await self.run(self._offload_bytes + 1 if is_compressed else len(body), work)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def expand(request: Request, body: bytes, *, max_bytes: int) -> bytes:
    """The body without its `Content-Encoding`. Raises `WireError` if it cannot be read."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding != "zstd":
        raise WireError(f"Content-Encoding {encoding!r} is not understood; send zstd or none")
    return decompress(body, max_bytes=max_bytes)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Integers of any size stay exact. Raises `WireError` for anything but a JSON object."""
    try:
        value = orjson.loads(body) if not _LONG_NUMBER.search(body) else json.loads(body)
    except ValueError:
        value = _parse_leniently(body)
    except RecursionError as error:
        raise WireError("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise WireError(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _parse_leniently(body: bytes) -> Any:
    """Accept `NaN` and `Infinity`, which are no JSON, so that the field that holds them can be named."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from error


def fingerprint(operation: str, body: bytes) -> bytes:
    """Equal for the same payload sent to the same operation."""
    return hashlib.sha256(operation.encode() + b"\0" + body).digest()


def check_int64(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise InvalidInput(f"{name} must lie between 0 and 2**63 - 1, not {value!r}")
    return value
