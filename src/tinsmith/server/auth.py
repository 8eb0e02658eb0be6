"""The layer that asks who calls. Behind it every request has a caller; in front of it nothing is known.

A key comes as `X-API-Key` (Tinker, Anthropic) or as `Authorization: Bearer` (OpenAI, Anthropic, Hugging Face), itself
or as a token that was given for it. A key that ends while a request is under way ends the request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinsmith.control.errors import Unauthorized
from tinsmith.control.signing import TOKEN_START
from tinsmith.observe.logs import note
from tinsmith.server.service import NOBODY, ServerState, set_caller
from tinsmith.types.errors import TinsmithError

OPEN_PATHS = frozenset(
    {"/", "/healthz", "/readyz", "/api/v1/healthz", "/api/v1/readyz", "/openapi.json", "/docs", "/docs/oauth2-redirect"}
)
"""Whether the server is there, and how it is spoken to, anybody may know."""
LINKED_PATHS = ("/api/v1/files/", "/api/v1/archives/", "/api/v1/traces/")
"""Below these a signed link takes a key's place; the routes check it."""
OWN_KEY = ("DELETE", "/api/v1/auth/apikey/me")
"""Ends its own key, and is answered."""
_BEARER = "bearer "


class _KeyEnded(Exception):
    """The request's key was revoked or has expired."""


class Authenticate:
    """ASGI middleware. `refuse` makes the answer to a request without a good key, in the dialect of its path."""

    def __init__(self, app: ASGIApp, *, state: ServerState, refuse: Callable[[Headers, str, TinsmithError], Response]):
        self._app = app
        self._state = state
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"]
        try:
            key_id = self._key_id(headers)
            caller = self._state.caller(key_id)
        except Unauthorized as error:
            if path not in OPEN_PATHS and not path.startswith(LINKED_PATHS):
                return await self._refuse(headers, path, error)(scope, receive, send)
            key_id = NOBODY
        else:
            note(user_id=caller.user_id)
        set_caller(scope, key_id)
        if key_id is None or key_id == NOBODY or (scope["method"], path) == OWN_KEY:
            return await self._app(scope, receive, send)
        return await self._attend(scope, receive, send, key_id)

    def _key_id(self, headers: Headers) -> int | None:
        """Raises `Unauthorized`."""
        if not self._state.asks_for_keys:
            return None
        secret = presented_key(headers)
        if secret is not None and secret.startswith(TOKEN_START):
            return self._state.control.signer.key_of_token(secret)
        return self._state.control.accounts.authenticate(secret).key_id

    async def _attend(self, scope: Scope, receive: Receive, send: Send, key_id: int) -> None:
        """Send nothing more once the key has ended: a poll may have been held, an answer may come in pieces."""
        has_length = False

        async def watched_send(message: Message) -> None:
            nonlocal has_length
            try:
                self._state.caller(key_id)
            except Unauthorized as error:
                if message["type"] == "http.response.start":
                    await self._refuse(Headers(scope=scope), scope["path"], error)(scope, receive, send)
                    raise _KeyEnded from error
                if not has_length:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    raise _KeyEnded from error
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            await send(message)

        with contextlib.suppress(_KeyEnded):
            await self._app(scope, receive, watched_send)


def presented_key(headers: Headers) -> str | None:
    """The first form that is there counts."""
    if key := headers.get("x-api-key", "").strip():
        return key
    authorization = headers.get("authorization", "").strip()
    return authorization[len(_BEARER) :].strip() if authorization.lower().startswith(_BEARER) else None
