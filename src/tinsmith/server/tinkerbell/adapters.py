"""Who has which adapters. A key has one session, which lives as long as it is used; a name in it is an adapter."""

from __future__ import annotations

import asyncio
import hashlib
import time

from starlette.requests import Request

from tinsmith.control.errors import ModelEnded, SessionEnded
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import CreateModel, NewSession, Submission, UnloadModel
from tinsmith.server.bodies import fingerprint
from tinsmith.server.settings import TinkerbellSettings
from tinsmith.server.tinkerbell.memory import MAX_ENDED_NAMES, Adapter, Memory, Owner
from tinsmith.server.tinkerbell.schemas import AddLoraBody
from tinsmith.types.errors import InvalidInput, NotFound, Overloaded, StorageError, TinsmithError
from tinsmith.types.params import LoraConfig

BASE = "base"
"""As a base model: the server's first."""


class AdapterBook:
    def __init__(self, control: GuardedControl, settings: TinkerbellSettings, memory: Memory) -> None:
        self._control = control
        self._settings = settings
        self._memory = memory
        self._opening = asyncio.Lock()

    async def owner(self, request: Request) -> Owner:
        """Whoever sends this key. A server without keys tells callers apart by whatever they send as `X-API-Key`.

        A session that has ended is replaced; its adapters ended with it.
        """
        caller = self._control.caller
        sent = request.headers.get("x-api-key", "") if caller.is_local else ""
        key = f"{caller.key_id}:{hashlib.sha256(sent.encode()).hexdigest()}"
        async with self._opening:
            owner = self._memory.find(key)
            if owner is not None and self._is_live(owner):
                return owner
            session_id = await self._control.create_session(
                NewSession(
                    tags=("tinkerbell",),
                    timeout_s=self._settings.session_timeout_s,
                    orders_by_arrival=True,
                )
            )
            owner = self._memory.new(key, session_id)
            ended = [owner.memo_of(name, ended=why) for name, why in owner.ended.items()]
            await asyncio.gather(*(self._control.remember(memo) for memo in (owner.memo(), *ended)))
            return owner

    def _is_live(self, owner: Owner) -> bool:
        try:
            self._control.heartbeat(owner.session_id)
        except SessionEnded as error:
            owner.ended.update(dict.fromkeys(owner.adapters, str(error)))  # written with the session that follows
            owner.adapters.clear()
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
        number = next(owner.model_numbers)
        model_id = f"{owner.session_id}:train:{number}"
        adapter = Adapter(name=name or model_id, model_id=model_id, base_model=base_model)
        memo = owner.memo_of(adapter.name, model_id=model_id, base_model=base_model)
        written = self._control.remember(memo)  # before the model: one without a name would be in nobody's hands
        try:
            receipt = await self._create_model(owner, body, number, base_model, context)
        except TinsmithError:
            self._control.forget(memo)
            raise
        adapter.last_used = time.monotonic()
        if not self._exists(adapter):
            self._control.forget(memo)
            return None, receipt
        owner.adapters[adapter.name] = adapter
        adapter.made = asyncio.ensure_future(self._made(owner, adapter, written, receipt))
        adapter.made.add_done_callback(lambda made: made.cancelled() or made.exception())
        return adapter, receipt

    async def _made(self, owner: Owner, adapter: Adapter, written: asyncio.Future[None], receipt: Submission) -> None:
        """Returns once it is on disk with its name. Raises `StorageError`; it is not there then."""
        try:
            await written
            await self._control.durable(receipt)
        except StorageError:
            if owner.adapters.get(adapter.name) is adapter:
                del owner.adapters[adapter.name]
            raise

    async def _create_model(
        self, owner: Owner, body: AddLoraBody, number: int, base_model: str, context: object
    ) -> Submission:
        return await self._control.create_model(
            CreateModel(
                session_id=owner.session_id,
                model_seq_id=number,
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

    def _exists(self, adapter: Adapter) -> bool:
        try:
            self._control.model_info(adapter.model_id)
        except TinsmithError:
            return False
        return True

    async def _fault(self, receipt: Submission) -> TinsmithError:
        """Raises `StorageError` if it was not even taken."""
        await self._control.durable(receipt)
        outcome = await self._control.wait_future(receipt.request_id, 0)
        error = getattr(outcome, "error", None)
        return error if isinstance(error, TinsmithError) else NotFound(f"no model {receipt.model_id!r}")

    def remove(self, owner: Owner, adapter: Adapter, context: object = None) -> tuple[Submission, asyncio.Future[None]]:
        """Its name is free again; once what comes with the receipt has ended, for good."""
        receipt = self._unload(adapter, context)
        if adapter.name == adapter.model_id:
            why = "it was removed with remove_lora; its saved weights remain"
            return receipt, self._forget(owner, adapter.name, why)
        owner.adapters.pop(adapter.name, None)
        return receipt, self._control.forget(owner.memo_of(adapter.name))

    def _forget(self, owner: Owner, name: str, why: str) -> asyncio.Future[None]:
        owner.adapters.pop(name, None)
        owner.ended[name] = why
        written = self._control.remember(owner.memo_of(name, ended=why))
        while len(owner.ended) > MAX_ENDED_NAMES:
            oldest, _ = owner.ended.popitem(last=False)
            self._control.forget(owner.memo_of(oldest))
        return written

    def _unload(self, adapter: Adapter, context: object) -> Submission:
        unload = UnloadModel(model_id=adapter.model_id)
        return self._control.submit(unload, fingerprint("remove_lora", adapter.model_id.encode()), context=context)

    def _make_room(self, owner: Owner) -> None:
        """End the adapter that was unused for longest if the key has as many as it may."""
        for adapter in list(owner.adapters.values()):
            try:
                self._control.model_info(adapter.model_id)
            except TinsmithError as error:
                self._forget(owner, adapter.name, str(error))
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
        self._forget(
            owner,
            oldest.name,
            f"it was unused for {idle_s:g} s and made room for another, for this key had {most}; "
            "its saved weights remain",
        )
