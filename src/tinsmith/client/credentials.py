"""What a client shows a server: a key, what a command prints, or a token that the server gave in exchange.

The value travels in the header `X-API-Key` and nowhere else; nothing here ends up in a message.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from pydantic import SecretStr

from tinsmith.client.errors import AuthenticationError, ConfigurationError, TinkerError

logger = logging.getLogger("tinsmith.client")

_JWT_START = "eyJ"
_RENEW_BEFORE_S = 60.0
_REFRESH_FALLBACK_S = 60.0
_COMMAND_TIMEOUT_S = 60.0


class Credential(Protocol):
    async def value(self) -> str:
        """What to send now. Raises `ConfigurationError` if there is nothing valid to send."""

    async def replace(self, rejected: str) -> bool:
        """Whether `value` gives something else than `rejected` from now on."""

    async def close(self) -> None: ...


class FixedKey:
    """A key, or a token that somebody else renews."""

    def __init__(self, key: SecretStr) -> None:
        self._key = key
        self._expires_at = expiry(key.get_secret_value()) if is_jwt(key.get_secret_value()) else math.inf

    async def value(self) -> str:
        if time.time() >= self._expires_at:
            raise ConfigurationError(
                "the token given as API key has expired: give a fresh one, or set TINKER_CREDENTIAL_CMD"
            )
        return self._key.get_secret_value()

    async def replace(self, rejected: str) -> bool:
        return False

    async def close(self) -> None:
        return None


class CommandKey:
    """What a shell command prints, asked anew for every use."""

    def __init__(self, command: str) -> None:
        self._command = command

    async def value(self) -> str:
        process = await asyncio.create_subprocess_shell(
            self._command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            printed, _ = await asyncio.wait_for(process.communicate(), _COMMAND_TIMEOUT_S)
        except TimeoutError as error:
            process.kill()
            raise ConfigurationError(f"TINKER_CREDENTIAL_CMD gave nothing within {_COMMAND_TIMEOUT_S:.0f} s") from error
        credential = printed.decode().strip()
        if process.returncode or not credential:
            raise ConfigurationError(f"TINKER_CREDENTIAL_CMD ended with {process.returncode} and printed no credential")
        if is_jwt(credential) and time.time() >= expiry(credential):
            raise ConfigurationError("TINKER_CREDENTIAL_CMD printed a token that has expired")
        return credential

    async def replace(self, rejected: str) -> bool:
        return False

    async def close(self) -> None:
        return None


class ExchangedToken:
    """A short-lived token that the server gives for a key. Renewed at half its life, or when the server refuses it."""

    def __init__(self, exchange: Callable[[], Awaitable[str]]) -> None:
        self._exchange = exchange
        self._token = ""
        self._lock = asyncio.Lock()
        self._refresh: asyncio.Task[None] | None = None

    async def value(self) -> str:
        if seconds_left(self._token) > _RENEW_BEFORE_S:
            return self._token
        async with self._lock:
            if seconds_left(self._token) <= _RENEW_BEFORE_S:
                await self._renew()
            return self._token

    async def replace(self, rejected: str) -> bool:
        async with self._lock:
            if self._token == rejected:
                self._token = await self._exchange()
        return True

    async def close(self) -> None:
        if self._refresh is not None:
            self._refresh.cancel()
            await asyncio.wait([self._refresh], timeout=1.0)

    async def _renew(self) -> None:
        """A token that still lives is kept if no other can be had; a key the server refuses is an error at once."""
        try:
            self._token = await self._exchange()
        except AuthenticationError:
            raise
        except TinkerError as error:
            if seconds_left(self._token) <= 0:
                raise
            logger.warning("the access token could not be renewed yet: %s", error)
        if self._refresh is None:
            self._refresh = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(_refresh_after(self._token))
            async with self._lock:
                try:
                    self._token = await self._exchange()
                except TinkerError as error:
                    logger.warning("the access token could not be renewed in advance: %s", error)


def is_jwt(credential: str) -> bool:
    return credential.startswith(_JWT_START)


def claims(token: str) -> dict[str, Any]:
    """What a token says of itself; its signature is the server's business. Raises `ValueError` if it says nothing."""
    try:
        payload = token.split(".")[1]
        decoded = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError) as error:
        raise ValueError("not a token with claims") from error
    if not isinstance(decoded, dict):
        raise ValueError("not a token with claims")
    return decoded


def expiry(token: str) -> float:
    """Seconds since 1970; 0 if the token does not say."""
    try:
        return float(claims(token)["exp"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def seconds_left(token: str) -> float:
    return expiry(token) - time.time() if token else 0.0


def stored_key(path: Path | None = None) -> str | None:
    """The default key of the file that `tinker auth login` writes. Raises `ConfigurationError` if it is damaged."""
    path = path or Path("~/.tinker/credentials.json").expanduser()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        default = stored.get("default")
        return None if default is None else str(stored["keys"][default]["key"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"the stored credentials in {str(path)!r} cannot be read") from error


def _refresh_after(token: str) -> float:
    """Half the life, a tenth more or less, so that many clients do not renew together."""
    try:
        known = claims(token)
        life = float(known["exp"]) - float(known["iat"])
    except (ValueError, KeyError, TypeError):
        return _REFRESH_FALLBACK_S
    return life * random.uniform(0.45, 0.55) if life > 0 else _REFRESH_FALLBACK_S
