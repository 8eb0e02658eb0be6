"""Time, names and chance: what control takes from outside, so that tests can give their own."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import secrets
import time
from typing import Protocol

_MAC_BYTES = 10
_BOOT_BYTES = 4
_COUNTER_BYTES = 6


class Clock(Protocol):
    def time(self) -> float:
        """Seconds since 1970, for records."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, for timeouts."""
        ...


class SystemClock:
    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class Ids(Protocol):
    def session_id(self) -> str: ...

    def checkpoint_id(self) -> str: ...

    def request_id(self) -> str: ...

    def issued(self, request_id: str) -> bool:
        """Whether this id was ever given out over the same data folder."""
        ...

    def seed(self) -> int:
        """A random number in [0, 2**63 - 1)."""
        ...


class SignedIds:
    """Request ids are a counter and a MAC over it: nobody can guess one, and an expired one is told from an invented
    one without remembering it. `key` must stay the same over restarts, `boot` must differ."""

    def __init__(self, key: bytes, boot: bytes | None = None) -> None:
        self._key = key
        self._boot = (boot or secrets.token_bytes(_BOOT_BYTES))[:_BOOT_BYTES].ljust(_BOOT_BYTES, b"\0")
        self._counter = itertools.count(1)

    def session_id(self) -> str:
        return f"sess-{secrets.token_hex(6)}"

    def checkpoint_id(self) -> str:
        return f"ckpt-{secrets.token_hex(8)}"

    def request_id(self) -> str:
        body = self._boot + next(self._counter).to_bytes(_COUNTER_BYTES, "big")
        return f"future_{body.hex()}{self._mac(body).hex()}"

    def issued(self, request_id: str) -> bool:
        prefix, _, digits = request_id.partition("_")
        if prefix != "future" or len(digits) != 2 * (_BOOT_BYTES + _COUNTER_BYTES + _MAC_BYTES):
            return False
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            return False
        return hmac.compare_digest(self._mac(raw[:-_MAC_BYTES]), raw[-_MAC_BYTES:])

    def seed(self) -> int:
        return secrets.randbelow(2**63 - 1)

    def _mac(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, key=self._key, digest_size=_MAC_BYTES).digest()
