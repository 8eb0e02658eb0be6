"""Who has which adapters. A key has one session, which lives as long as it is used; a name in it is an adapter."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from starlette.requests import Request

from tinsmith.control.errors import ModelEnded, SessionEnded
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import CreateModel, NewSession, Submission, UnloadModel
from tinsmith.server.bodies import fingerprint
from tinsmith.server.settings import TinkerbellSettings
from tinsmith.server.tinkerbell.schemas import AddLoraBody
from tinsmith.types.errors import InvalidInput, NotFound, Overloaded, TinsmithError
from tinsmith.types.params import LoraConfig

BASE = "base"
"""As a base model: the server's first."""
MAX_ENDED_NAMES = 1000


@dataclass(slots=True, eq=False, kw_only=True)
class Adapter:
    name: str
    """As its user calls it."""
    model_id: str
    base_model: str
    last_used: float = 0.0
    """Monotonic seconds."""
    version: int = 0
    """Counts the requests that change its weights."""
    published: tuple[int, asyncio.Task[str]] | None = None
    """The version that can be sampled, and the sampler's id once it has one."""


@dataclass(slots=True, eq=False, kw_only=True)
class Owner:
    """One key."""

    session_id: str
    adapters: dict[str, Adapter] = field(default_factory=dict)
    ended: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """Names that were adapters, and why they are not any more; the newest `MAX_ENDED_NAMES`."""
    samplers: dict[str, str] = field(default_factory=dict)
    """Samplers of base models and checkpoints."""
    model_numbers: Iterator[int] = field(default_factory=itertools.count)
    sampler_numbers: Iterator[int] = field(default_factory=itertools.count)

    def forget(self, name: str, why: str) -> None:
        self.adapters.pop(name, None)
        self.ended[name] = why
        while len(self.ended) > MAX_ENDED_NAMES:
            self.ended.popitem(last=False)


class AdapterBook:
    def __init__(self, control: GuardedControl, settings: TinkerbellSettings) -> None:
        self._control = control
        self._settings = settings
        self._owners: dict[str, Owner] = {}
        self._opening = asyncio.Lock()

    async def owner(self, request: Request) -> Owner:
        """Whoever sends this key. A server without keys tells callers apart by whatever they send as `X-API-Key`.

        A session that has ended is replaced; its adapters ended with it.
        """
        caller = self._control.caller
        sent = request.headers.get("x-api-key", "") if caller.is_local else ""
        key = hashlib.sha256(sent.encode()).hexdigest()
        async with self._opening:
            owner = self._owners.get(key)
            if owner is not None and self._is_live(owner):
                return owner
            session_id = await self._control.create_session(
                NewSession(
                    tags=("tinkerbell",),
                    timeout_s=self._settings.session_timeout_s,
                    orders_by_arrival=True,
                )
            )
            if owner is None:
                owner = self._owners[key] = Owner(session_id=session_id)
            else:
                self._owners[key] = owner = Owner(session_id=session_id, ended=owner.ended)
            return owner

    def _is_live(self, owner: Owner) -> bool:
        try:
            self._control.heartbeat(owner.session_id)
        except SessionEnded as error:
            for name in list(owner.adapters):
                owner.forget(name, str(error))
            return False
        return True

    def base_model(self, name: str) -> str:
        """Raises `NotFound` listing what there is."""
        names = [card.name for card in self._control.base_models()]
        if name == BASE:
            return names[0]
        if name not in names:
            raise NotFound(f"base_model {name!r} is not on this server; it has: {BASE!r} ({names[0]}), {names!r}")
        return name

    def find(self, owner: Owner, name: str) -> Adapter:
        """Raises `ModelEnded`, `InvalidInput` for a model that the Tinker API drives, `NotFound`."""
        adapter = owner.adapters.get(name)
        if adapter is not None:
            adapter.last_used = time.monotonic()
            return adapter
        if name in owner.ended:
            raise ModelEnded(f"model_id {name!r} has ended: {owner.ended[name]}")
        if ":train:" in name:
            self._control.model_info(name)
            raise InvalidInput(
                f"model_id {name!r} was not made by add_lora under this key; a model is driven through one API only"
            )
        raise NotFound(f"there is no model_id {name!r}; make one with POST /api/v1/add_lora")

    async def find_or_create(self, owner: Owner, name: str) -> tuple[Adapter, bool]:
        """The adapter, and whether this call made it."""
        try:
            return self.find(owner, name), False
        except NotFound:
            if not self._settings.auto_create or ":train:" in name:
                raise
        if name == BASE or any(name == card.name for card in self._control.base_models()):
            raise InvalidInput(f"model_id {name!r} is a base model, which is never trained; use add_lora")
        body = AddLoraBody(rank=self._settings.auto_rank, alpha=self._settings.auto_alpha)
        adapter, receipt = await self.create(owner, body, name=name)
        if adapter is None:
            raise await self._fault(receipt)
        return adapter, True

    async def create(
        self, owner: Owner, body: AddLoraBody, *, name: str | None = None, context: object = None
    ) -> tuple[Adapter | None, Submission]:
        """`None` if the server refused it; the receipt's future says why. Raises `Overloaded` if there are too many."""
        base_model = self.base_model(body.base_model)
        self._make_room(owner)
        receipt = await self._control.create_model(
            CreateModel(
                session_id=owner.session_id,
                model_seq_id=next(owner.model_numbers),
                base_model=base_model,
                lora_config=LoraConfig(
                    rank=body.rank,
                    seed=body.seed,
                    train_attn=body.train_attn,
                    train_mlp=body.train_mlp,
                    train_unembed=body.train_unembed,
                ),
                alpha=body.alpha,
            ),
            context=context,
        )
        assert receipt.model_id is not None
        adapter = Adapter(name=name or receipt.model_id, model_id=receipt.model_id, base_model=base_model)
        adapter.last_used = time.monotonic()
        if not self._exists(adapter):
            return None, receipt
        owner.adapters[adapter.name] = adapter
        return adapter, receipt

    def _exists(self, adapter: Adapter) -> bool:
        try:
            self._control.model_info(adapter.model_id)
        except TinsmithError:
            return False
        return True

    async def _fault(self, receipt: Submission) -> TinsmithError:
        outcome = await self._control.wait_future(receipt.request_id, 0)
        error = getattr(outcome, "error", None)
        return error if isinstance(error, TinsmithError) else NotFound(f"no model {receipt.model_id!r}")

    def remove(self, owner: Owner, adapter: Adapter, context: object = None) -> Submission:
        """Its name is free again."""
        receipt = self._unload(adapter, context)
        owner.adapters.pop(adapter.name, None)
        if adapter.name == adapter.model_id:
            owner.forget(adapter.name, "it was removed with remove_lora; its saved weights remain")
        return receipt

    def _unload(self, adapter: Adapter, context: object) -> Submission:
        unload = UnloadModel(model_id=adapter.model_id)
        return self._control.submit(unload, fingerprint("remove_lora", adapter.model_id.encode()), context=context)

    def _make_room(self, owner: Owner) -> None:
        """End the adapter that was unused for longest if the key has as many as it may."""
        for adapter in list(owner.adapters.values()):
            try:
                self._control.model_info(adapter.model_id)
            except TinsmithError as error:
                owner.forget(adapter.name, str(error))
        most, idle_s = self._settings.max_adapters_per_key, self._settings.idle_s
        if len(owner.adapters) < most:
            return
        oldest = min(owner.adapters.values(), key=lambda adapter: adapter.last_used)
        if time.monotonic() - oldest.last_used < idle_s:
            raise Overloaded(
                f"this key has {len(owner.adapters)} adapters in use, the most it may have; remove one with "
                f"POST /api/v1/remove_lora. One that is unused for {idle_s:g} s makes room by itself"
            )
        self._unload(oldest, None)
        owner.forget(
            oldest.name,
            f"it was unused for {idle_s:g} s and made room for another, for this key had {most}; "
            "its saved weights remain",
        )
