"""What routes need. `ServerState` is the server's; `Service` is what one caller's requests see of it.

A route gets a `Service` by `ServiceDep` (or `service_of`, where there are no dependencies), and control only through
it: guarded, as its caller may use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends
from starlette.requests import Request
from starlette.types import Scope

from tinsmith.control.completions import Completion
from tinsmith.control.errors import Unauthorized
from tinsmith.control.futures import Outcome, Pending
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.identities import LOCAL, Caller
from tinsmith.control.inspection import Inspection
from tinsmith.control.memos import Memo
from tinsmith.control.recipes import Make
from tinsmith.control.service import Control
from tinsmith.control.signing import LinkRefused, SignedLink
from tinsmith.observe.logs import note
from tinsmith.server.bodies import Codecs
from tinsmith.server.chat.desk import ChatDesk, ChatTexts
from tinsmith.server.chat.recorder import Recorder
from tinsmith.server.hub.repositories import Repositories
from tinsmith.server.settings import ServerSettings

T = TypeVar("T")


_CLIENTS_PER_START = 10_000
"""A server that is started again gives out numbers that no earlier one gave."""
_NUMBERS_PER_START = 1_000_000
_CALLER = "tinsmith.caller"
NOBODY = -1
"""As the id of a key: whoever asks without one for what needs none."""
_STRANGER = Caller(user_id="", role="viewer", scopes=frozenset(), key_id=NOBODY)


class ServerState:
    def __init__(self, control: Control, settings: ServerSettings) -> None:
        self.control = control
        self.settings = settings
        self.codecs = Codecs(threads=settings.codec_threads, offload_bytes=settings.offload_bytes)
        self.repositories = Repositories()
        self.recorder = None if settings.record_folder is None else Recorder(settings.record_folder)
        self.texts = ChatTexts(self.codecs)
        self._services: dict[int | None, Service] = {}
        self._polls: set[asyncio.Task[Any]] = set()
        self._client_numbers = itertools.count(1)
        self._is_draining = False

    @property
    def asks_for_keys(self) -> bool:
        """Whether anybody needs one."""
        return self.settings.accounts and (self.settings.keys_required or self.control.accounts.has_keys)

    def caller(self, key_id: int | None) -> Caller:
        """Raises `Unauthorized` if the key has ended."""
        if key_id == NOBODY:
            return _STRANGER
        if not self.settings.accounts:
            return LOCAL
        if key_id is None and self.settings.keys_required:
            raise Unauthorized("this server asks for a key, and has none yet: `tinsmith admin keys create` makes one")
        return self.control.accounts.caller(key_id)

    def seen_by(self, key_id: int | None) -> Service:
        """As the caller with this key sees it; one for all its requests."""
        service = self._services.get(key_id)
        if service is None:
            self._forget_ended()
            service = self._services[key_id] = Service(self, partial(self.caller, key_id))
        return service

    def _forget_ended(self) -> None:
        for key_id, service in list(self._services.items()):
            try:
                self.caller(key_id)
            except Unauthorized:
                service.chat.drain()
                del self._services[key_id]

    def seen_by_link(self, resource: str, link: SignedLink) -> Service:
        """As whoever was given the link sees it. Raises `LinkRefused`."""
        self.control.signer.check(resource, link)
        try:
            self.caller(link.key_id)
        except Unauthorized as error:
            raise LinkRefused(f"the key that this link was given for has ended: {error}") from error
        return self.seen_by(link.key_id)

    # ---- what a dialect does for nobody in particular, and goes on with after a crash ----

    @property
    def background(self) -> GuardedControl:
        """As the server itself sees control."""
        return GuardedControl(self.control, lambda: LOCAL)

    def teach(self, kind: str, make: Make) -> None:
        self.control.recipes.teach(kind, make)

    def take_memos(self) -> list[Memo]:
        return self.control.memos.take()

    @property
    def first_number(self) -> int:
        """Where numbers that must not be given out twice begin, in a server that was started again."""
        return self.control.num_restarts * _NUMBERS_PER_START

    @property
    def num_open_polls(self) -> int:
        return len(self._polls)

    @property
    def is_draining(self) -> bool:
        """The server is about to end."""
        return self._is_draining

    def inspect(self) -> Inspection | None:
        """For figures; `None` unless the server runs."""
        seen = self.control.inspect()
        return None if seen is None else replace(seen, num_open_polls=self.num_open_polls)

    async def hold(self, request: Request, wait: Coroutine[Any, Any, T], now: T) -> T:
        """What `wait` comes to; `now` if the client leaves or the server drains before."""
        if self._is_draining:
            wait.close()
            return now
        waiter = asyncio.create_task(wait)
        departure = asyncio.create_task(_departure(request))
        self._polls.add(waiter)
        try:
            await asyncio.wait({waiter, departure}, return_when=asyncio.FIRST_COMPLETED)
            if waiter.done() and not waiter.cancelled():
                return waiter.result()
            return now
        finally:
            self._polls.discard(waiter)
            for task in (waiter, departure):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({waiter, departure})

    def next_client_number(self) -> int:
        """1, 2, … for clients that join a sampling session; the client that made it is 0."""
        return self.control.num_restarts * _CLIENTS_PER_START + next(self._client_numbers)

    def drain(self) -> None:
        """The server is about to end: answer every open poll with "still pending" and hold no more, end chats."""
        self._is_draining = True
        for waiter in self._polls:
            waiter.cancel()
        for service in self._services.values():
            service.chat.drain()

    def close(self) -> None:
        self.drain()
        if self.recorder is not None:
            self.recorder.close()
        self.codecs.close()


class Service:
    """The server as one caller sees it."""

    def __init__(self, state: ServerState, identify: Callable[[], Caller]) -> None:
        self._state = state
        self.control = GuardedControl(state.control, identify)
        self.settings = state.settings
        self.codecs = state.codecs
        self.repositories = state.repositories
        self.chat = ChatDesk(self.control, state.codecs, state.texts, state.recorder)
        self._kept: dict[type[Any], Any] = {}
        if state.is_draining:
            self.chat.drain()

    def keep(self, kind: type[T], make: Callable[[], T]) -> T:
        """What a dialect remembers of this caller; made when it is first asked for."""
        if kind not in self._kept:
            self._kept[kind] = make()
        return cast(T, self._kept[kind])

    @property
    def asks_for_keys(self) -> bool:
        return self._state.asks_for_keys

    @property
    def is_draining(self) -> bool:
        """The server is about to end."""
        return self._state.is_draining

    def identity_token(self) -> str:
        """For the caller's key; it ends with the key."""
        caller = self.control.caller
        key = None if caller.key_id is None else self._state.control.accounts.key(caller.key_id)
        return self._state.control.signer.identity_token(caller, None if key is None else key.expires_at)

    def sign(self, resource: str) -> SignedLink:
        """A link to a resource, for whoever has it; it ends with the caller's key."""
        return self._state.control.signer.sign(resource, self.settings.link_ttl_s, self.control.caller.key_id)

    async def poll(self, request: Request, request_id: str, hold_s: float | None = None) -> Outcome | Pending:
        """The outcome, or `Pending` once the hold time is over, the client has left or the server drains.

        `hold_s` is the settings' unless given.

        The body of `request` must have been read. Raises `NotFound` or `FutureExpired`.
        """
        note(request_id=request_id)
        now = await self.control.wait_future(request_id, 0)
        if isinstance(now, Outcome):
            return now
        held_s = self.settings.poll_hold_s if hold_s is None else hold_s
        return await self._state.hold(request, self.control.wait_future(request_id, held_s), now)

    async def poll_completions(
        self, request: Request, sampler_id: str, client: int, cursor: int, hold_s: float
    ) -> tuple[list[Completion], int]:
        """What `Control.completions` says, held as in `poll`."""
        now = await self.control.completions(sampler_id, client, cursor, 0)
        if now[0] or hold_s <= 0:
            return now
        return await self._state.hold(request, self.control.completions(sampler_id, client, cursor, hold_s), now)

    def next_client_number(self) -> int:
        """1, 2, … for clients that join a sampling session; the client that made it is 0."""
        return self._state.next_client_number()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def state_of(scope: Scope) -> ServerState:
    state: ServerState = scope["app"].state.service
    return state


def set_caller(scope: Scope, key_id: int | None) -> None:
    """Whose request it is; done once, by the layer that authenticates."""
    scope[_CALLER] = key_id


def service_of(request: Request) -> Service:
    return state_of(request.scope).seen_by(request.scope[_CALLER])


ServiceDep = Annotated[Service, Depends(service_of)]


def service_by_link(request: Request, resource: str, link: SignedLink) -> Service:
    """For routes that need a link and no key. Raises `LinkRefused`."""
    return state_of(request.scope).seen_by_link(resource, link)
